"""What the documentation shows must run: Python as it stands, commands as far as parsing."""

import importlib.util
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import pytest

from eqrl import _advantages, _losses, _select


ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if page.exists()]


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Line number and content of each fenced block of one language, indented ones included."""
    fence = re.compile(rf"^([ \t]*)```{language}\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [
        (text[: match.start(2)].count("\n") + 1, textwrap.dedent(match[2]))
        for match in fence.finditer(text)
    ]


def example_commands(text: str) -> list[list[str]]:
    """The `python examples/...` commands of all bash blocks, as words."""
    found = []
    for _, block in blocks(text, "bash"):
        joined = block.replace("\\\n", " ")
        for command in re.split(r"\n|&&|;", joined):
            words = shlex.split(command.removeprefix("$ "), comments=True)
            if words[:1] == ["python"] and words[1:2] and words[1].startswith("examples/"):
                found.append(words)
    return found


COMMANDS = sorted({tuple(words) for page in PAGES for words in example_commands(page.read_text())})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "__docs__"}
    # A reader's session has jax's own defaults, not this suite's strict ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for line, block in blocks(page.read_text(), "python"):
            # Blank lines in front make a traceback point into the page.
            exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_parse(words):
    done = subprocess.run(
        [sys.executable, *words[1:], "--print-config"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "derived:" in done.stdout


def test_the_readme_shows_the_first_command():
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    assert ("python", "examples/gsm8k.py", "--algo.name", "reinforce++") in COMMANDS


def _reference():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_say_what_the_docstrings_say():
    stale = [
        name
        for name, text in _reference().pages().items()
        if (ROOT / "docs" / name).read_text() != text
    ]
    assert not stale, "run python docs/make_reference.py"


def test_every_piece_is_on_a_page_and_every_estimator_has_a_figure():
    reference = _reference()
    tables = (reference.ESTIMATORS, reference.OBJECTIVES, reference.REDUCTIONS)
    listed = [name for table in tables for names in table.values() for name in names]
    public = [
        name
        for module in (_advantages, _losses, _select)
        for name, x in vars(module).items()
        if inspect.isfunction(x) and not name.startswith("_")
    ]
    assert sorted(listed) == sorted(public)
    for name in sum(reference.ESTIMATORS.values(), []):
        assert (ROOT / f"docs/images/estimators/{name}.png").stat().st_size > 2_000, name


def test_the_pieces_of_the_walk_through_are_those_of_the_plugin():
    code = (ROOT / "examples/my_pieces.py").read_text()
    shown = [block for _, block in blocks((ROOT / "docs/extending.md").read_text(), "python")]
    shown = [re.sub(r"^import.*\n+", "", block, flags=re.MULTILINE) for block in shown]
    pieces = [block for block in shown if re.match("def |class ", block)]
    assert len(pieces) == 4
    for block in pieces:
        assert block.strip() in code
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= 12, block


def test_blocks_and_commands_are_found():
    text = "x\n```python\na = 1\n```\n- y\n  ```python\n  b = 2\n  ```\n"
    assert blocks(text, "python") == [(3, "a = 1\n"), (7, "b = 2\n")]
    text = '```bash\npip install x && python examples/a.py \\\n  --b "c d"  # e\n$ python -V\n```\n'
    assert example_commands(text) == [["python", "examples/a.py", "--b", "c d"]]
