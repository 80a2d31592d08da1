"""What the documentation shows must run: Python as it stands, commands as far as parsing."""

import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import pytest


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


def test_blocks_and_commands_are_found():
    text = "x\n```python\na = 1\n```\n- y\n  ```python\n  b = 2\n  ```\n"
    assert blocks(text, "python") == [(3, "a = 1\n"), (7, "b = 2\n")]
    text = '```bash\npip install x && python examples/a.py \\\n  --b "c d"  # e\n$ python -V\n```\n'
    assert example_commands(text) == [["python", "examples/a.py", "--b", "c d"]]
