"""Does the suite notice a broken formula? Breaks the sources one place at a time, runs the tests.

    python bench/mutants.py                      # everything; two hours on two cores
    python bench/mutants.py --sample 400         # so many, chosen at random; half an hour
    python bench/mutants.py --only rloo,clipped  # files of these names
    python bench/mutants.py --list               # what would be tried

Each mutant is one edit of one file in a copy of the repository: a sign, the direction of a
comparison, a denominator, a default (ddof, eps), a constant, a swapped `where`, a removed
stop-gradient, mask, declaration or link of a chain. The tests of its family that bear the member's
name run first, then its whole family, then algorithms, presets and invariants. Arguments of
`check_...` calls (legal ranges) and messages are not mutated. Prints killed and surviving mutants,
and writes them to `--out`.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple


ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ("_advantages", "_losses", "_select", "algorithms", "presets")
SINGLE = ("_masked.py", "_kl.py")
# What a mutant of a member has to get past: the tests of its family that bear its name, the rest of
# its family, then all that build it without naming it. Nothing else imports it.
FAMILIES = {
    "_advantages": (
        "test_advantages.py", "test_advantages_groups.py", "test_advantages_time.py",
        "test_advantages_kl.py", "test_advantages_lengths.py", "test_contract.py",
    ),
    "_losses": (
        "test_losses.py", "test_terms.py", "test_term_gradients.py", "test_term_covariance.py",
        "test_factors.py", "test_factors_rollout.py", "test_kl.py", "test_contract_factors.py",
        "test_contract.py",
    ),
    "_select": ("test_select.py",),
}  # fmt: skip
WIDE = (
    "test_presets.py", "test_algorithms.py", "test_invariants.py", "test_invariants_losses.py",
)  # fmt: skip
SHARED = ("base", "factor", "ratio", "weighting")
TIMEOUT = 900  # seconds; a mutant that never ends is a killed one

_SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
    ast.Lt: ">", ast.Gt: "<", ast.LtE: ">=", ast.GtE: "<=", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
_CALLS = {
    "maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max",
    "segment_max": "segment_min", "segment_min": "segment_max", "any": "all", "all": "any",
    "argmax": "argmin", "cumsum": "cumprod", "exp": "expm1", "expm1": "exp",
}  # fmt: skip


class Mutant(NamedTuple):
    """One edit: characters `start` to `end` of `file` become `text`."""

    file: str
    line: int
    start: int
    end: int
    text: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, file: str, source: str):
        self.file, self.source, self.found = file, source, []
        self.wiring = "algorithms/" in file or "presets/" in file
        starts = [0]
        for line in source.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self._starts = starts

    def place(self, node: ast.AST) -> tuple[int, int]:
        first = self._starts[node.lineno - 1] + node.col_offset  # type: ignore
        last = self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore
        return first, last

    def text(self, node: ast.AST) -> str:
        start, end = self.place(node)
        return self.source.encode()[start:end].decode()

    def add(self, node: ast.AST, text: str) -> None:
        start, end = self.place(node)
        what = f"`{' '.join(self.text(node).split())}` -> `{' '.join(text.split())}`"
        self.found.append(Mutant(self.file, node.lineno, start, end, text, what))  # type: ignore

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            if not isinstance(statement, ast.Expr | ast.Raise):  # docstrings, checks, messages
                self.visit(statement)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if any(isinstance(statement, ast.Raise) for statement in node.body):
            return  # a refusal of bad input
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = f"({self.text(node.left)})", f"({self.text(node.right)})"
        if self.wiring:  # of pieces, where another operator would only be a TypeError
            self.add(node, left)
            self.add(node, right)
        elif not isinstance(node.right, ast.Dict | ast.DictComp) and type(node.op) in _SWAPS:
            self.add(node, f"({left} {_SWAPS[type(node.op)]} {right})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Invert):
            self.add(node, f"({self.text(node.operand)})")
        self.visit(node.operand)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and type(node.ops[0]) in _SWAPS:
            sides = self.text(node.left), self.text(node.comparators[0])
            self.add(node, f"(({sides[0]}) {_SWAPS[type(node.ops[0])]} ({sides[1]}))")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, str(not value))
        elif isinstance(value, int):
            self.add(node, str(1 - value) if value in (0, 1) else str(value + 1))
        elif isinstance(value, float):
            self.add(node, repr(value * 10 if value else 1.0))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        pass  # indices and annotations: a wrong axis does not run

    def visit_Tuple(self, node: ast.Tuple) -> None:
        for part in node.elts:
            self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        if name is None or name.startswith("check_") or name in ("refuse_singletons", "field"):
            return
        if name in ("stop_gradient", "zero_unmasked"):
            self.add(node, f"({self.text(node.args[0])})")
        if name == "where" and len(node.args) == 3:
            condition, yes, no = map(self.text, node.args)
            self.add(node, f"{self.text(node.func)}({condition}, {no}, {yes})")
        if name in _CALLS:
            rest = self.text(node)[len(self.text(node.func)) :]
            self.add(node, self.text(node.func)[: -len(name)] + _CALLS[name] + rest)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg == "requires" and isinstance(keyword.value, ast.Tuple):
                self.add(keyword.value, "()")
            elif keyword.arg not in ("axis", "keepdims", "num_segments", "num_keys", "reverse"):
                self.visit(keyword.value)


def mutants(only: set[str]) -> Iterator[Mutant]:
    """Every mutant of every target file."""
    files = [p for target in TARGETS for p in sorted((ROOT / "eqrl" / target).glob("*.py"))]
    files += [ROOT / "eqrl" / name for name in SINGLE]
    for path in files:
        if path.name == "__init__.py" or (only and path.stem not in only):
            continue
        source = path.read_text()
        finder = Finder(str(path.relative_to(ROOT)), source)
        finder.visit(ast.parse(source))
        yield from finder.found


# What tests/conftest.py sets before jax is imported; here jax is imported before it.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def _pytest(folder: pathlib.Path, words: list[str]) -> bool:
    """Whether the tests pass in `folder`, in a fork that never returns here."""
    child = os.fork()
    if child:
        return _wait(child)
    os.setsid()
    devnull = os.open(
        os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    import pytest  # already loaded by the parent

    try:
        # pytest would say that plugins were imported before it could rewrite their asserts.
        options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
        # Of its own: sessions side by side clean up each other's temporary folders.
        options += ["--basetemp", str(folder / "temporary")]
        code = int(pytest.main([*options, *words]))
    except BaseException:  # a mutant may raise anything, also at import
        code = 1
    os._exit(code)


def _wait(child: int) -> bool:
    """True if the child ends with 0 (tests passed) or 5 (none were selected) in time."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) in (0, 5)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _survives(folder: pathlib.Path, mutant: Mutant) -> bool:
    path = folder / mutant.file
    original = path.read_bytes()
    path.write_bytes(original[: mutant.start] + mutant.text.encode() + original[mutant.end :])
    try:
        return all(_pytest(folder, words) for words in _rounds(folder, mutant.file))
    finally:
        path.write_bytes(original)


def _rounds(folder: pathlib.Path, file: str) -> list[list[str]]:
    """Arguments of the pytest runs that a mutant of `file` must pass, the quickest first."""
    path = pathlib.Path(file)
    existing = lambda names: [  # noqa: E731
        f"tests/{name}" for name in names if (folder / "tests" / name).exists()
    ]
    wide = existing(WIDE)
    if path.parent.name in ("algorithms", "presets"):
        return [wide]
    family = existing(FAMILIES.get(path.parent.name, ()))
    everything = existing(dict.fromkeys(name for names in FAMILIES.values() for name in names))
    if path.parent.name not in FAMILIES:
        return [everything, wide]
    if path.stem.startswith("_") or path.stem in SHARED:
        return [family, wide]
    values = [name for name in family if "contract" not in name]
    return [[*values, "-k", path.stem], [*family, "-k", path.stem], family, wide]


def _work(number: int, todo, done) -> None:
    """One worker: its own copy of the repository, and mutants until none are left."""
    import jax  # already loaded by the parent

    # One cache a worker: two writers of one entry are a warning, which tests take for an error.
    cache = os.path.join(tempfile.gettempdir(), f"eqrl-mutants-cache-{number}")
    jax.config.update("jax_compilation_cache_dir", cache)
    with tempfile.TemporaryDirectory(prefix=f"mutants-{number}-") as temp:
        folder = pathlib.Path(temp) / "eqrl"
        for name in ("eqrl", "tests", "examples", "pyproject.toml", "README.md"):
            if (ROOT / name).is_dir():
                skip = shutil.ignore_patterns("__pycache__", "demo_model")
                shutil.copytree(ROOT / name, folder / name, ignore=skip)
            else:
                shutil.copy(ROOT / name, folder / name)
        while (mutant := todo.get()) is not None:
            done.put((mutant, _survives(folder, mutant)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma-separated file names without .py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sample", type=int, default=0, help="try so many at random; 0 = all")
    parser.add_argument("--skip", type=int, default=0, help="go on after so many of an earlier run")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--out", default="", help="JSON file of killed and surviving mutants")
    arguments = parser.parse_args()
    chosen = list(mutants(set(filter(None, arguments.only.split(",")))))
    # In random order, so that a run that is cut short still says something of all.
    random.Random(0).shuffle(chosen)
    chosen = chosen[arguments.skip : arguments.sample or None]
    if arguments.list:
        print(*chosen, sep="\n")
        print(len(chosen), "mutants")
        return 0
    os.environ.update(_ENVIRONMENT)
    for name in ("beartype", "equinox", "jax", "jaxtyping", "numpy", "optax", "pytest"):
        importlib.import_module(name)  # once, before the forks

    context = multiprocessing.get_context("fork")
    todo, done = context.Queue(), context.Queue()
    # An edit that changes nothing must survive, or every kill below would mean nothing.
    control = Mutant("eqrl/_masked.py", 0, 0, 0, "", "unchanged")
    first = [] if arguments.skip else [control]
    for mutant in [*first, *chosen, *[None] * arguments.workers]:
        todo.put(mutant)
    workers = [
        context.Process(target=_work, args=(number, todo, done), daemon=False)
        for number in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    survivors, start = [], time.monotonic()
    for number in range(len(first) + len(chosen)):
        mutant, survived = done.get()
        if mutant == control and not survived:
            raise SystemExit("the tests fail on unchanged sources; mend them first")
        if survived and mutant != control:
            survivors.append(mutant)
        minutes = (time.monotonic() - start) / 60
        mark = "SURVIVES" if survived else "killed  "
        print(f"{number}/{len(chosen)} {minutes:5.1f} min {mark} {mutant}", flush=True)
    share = len(survivors) / max(len(chosen), 1)
    print(f"\n{len(chosen)} mutants, {len(survivors)} survive ({100 * share:.1f} %)")
    print(*survivors, sep="\n")
    if arguments.out:
        result = {"mutants": len(chosen), "survivors": [str(mutant) for mutant in survivors]}
        pathlib.Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
