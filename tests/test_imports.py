"""The shape of the house: what importing eqrl costs, who may know whom, and what is documented."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest


PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "eqrl"
HEAVY = ("torch", "transformers", "datasets", "wandb", "tyro", "orbax", "matplotlib", "rich")

# Who may import whom, lowest first: a part may import parts of earlier rows (and itself).
LAYERS = (
    {"_types", "_checks"},
    {"_masked", "_lifted"},
    {"_transform", "_kl", "_select"},
    {"_advantages", "_losses"},
    {"algorithms", "_parse"},
    {"presets"},
    {"_refill", "_metrics", "_score"},
    {"_update"},
)
# Parts beside the estimators: the carriers, and these.
CARRIERS = {"_types", "_checks", "_masked", "_prompts"}
ISLANDS = {
    "_prompts": set(),
    "_pack": set(),
    "_estimate_pass_at_k": set(),
    "_optimizer": set(),
    "_logprobs": set(),
    "logprobs": {"_logprobs"},
    "samplers": {"models", "_pack", "_logprobs"},
    "models": set(),
    "rewards": set(),
    "data": set(),
    "tracking": set(),
    "checkpoint": set(),
    "sharding": {"models"},
}
# The training step is where both meet.
_MEETING = {"_score", "_update", "_refill", "_metrics"}


def _part(path: pathlib.Path) -> str:
    """The top-level name under eqrl/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: pathlib.Path) -> set[str]:
    """The parts of eqrl that a file imports, at its top or inside functions."""
    package = ["eqrl", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{name.name}" for name in node.names}
    return {name.split(".")[1] for name in found if name.startswith("eqrl.")}


def _allowed(part: str) -> set[str] | None:
    """The parts it may import; `None` for a part in no table."""
    if part in ISLANDS:
        return CARRIERS | ISLANDS[part] | {part}
    for number, layer in enumerate(LAYERS):
        if part in layer:
            below = set().union(*LAYERS[:number])
            beside = set(ISLANDS) if part in _MEETING else {"_prompts"}
            siblings = layer if part in _MEETING else set()
            return below | beside | siblings | {part}
    return None


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    allowed = _allowed(_part(path))
    assert allowed is not None, f"say in this test what {_part(path)} may import"
    assert _imports(path) <= allowed


def test_the_graph_sees_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "_x.py"
    file.write_text(
        "import eqrl._a\nfrom eqrl import _b\nfrom eqrl._c.d import e\n"
        "def f():\n    from .._g import h\n    from .. import _i\n    from ._j import k\n"
    )
    assert _imports(file) == {"_a", "_b", "_c", "_g", "_i", "models"}
    assert _part(file) == "models"


def _loaded_by(statement: str) -> set[str]:
    """Which heavy packages are loaded in a fresh interpreter after this statement."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_eqrl_loads_nothing_heavy():
    assert _loaded_by("import eqrl") == set()


def test_importing_every_module_loads_nothing_heavy():
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names]
    assert _loaded_by("\n".join(f"import {name}" for name in names)) == set()


def test_the_heavy_check_can_fail():
    assert _loaded_by("import eqrl, tyro") >= {"tyro"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_library_knows_no_data_set_by_name(path):
    assert "gsm8k" not in path.read_text().lower()


def _public(module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    }


def _modules():
    """eqrl and its public submodules."""
    eqrl = importlib.import_module("eqrl")
    inner = [value for value in vars(eqrl).values() if inspect.ismodule(value)]
    prefix = "eqrl."
    public = [module for module in inner if module.__name__.startswith(prefix)]
    return [eqrl, *(m for m in public if not m.__name__.removeprefix(prefix).startswith("_"))]


def test_every_public_name_is_documented():
    bare = [
        f"{module.__name__}.{name}"
        for module in _modules()
        for name, value in _public(module).items()
        # A dataclass without a docstring gets its signature as one.
        if (getattr(value, "__module__", "") or "").startswith("eqrl")
        and (not inspect.getdoc(value) or inspect.getdoc(value).startswith(f"{name}("))  # pyright: ignore
    ]
    assert bare == []


def test_the_surface_is_not_empty():
    names = set(_public(importlib.import_module("eqrl")))
    assert {"Rollout", "Batch", "Scores", "rloo", "whiten", "clip", "parse"} <= names
