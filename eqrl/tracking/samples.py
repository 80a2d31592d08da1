"""Sample completions for reading: the check that no number replaces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .files import write_atomic


class Sample(NamedTuple):
    """One completion.

    Attributes:
        prompt: text the model was given.
        completion: text it answered.
        gold: the right answer.
        rewards: unweighted reward of each function.
    """

    prompt: str
    completion: str
    gold: str
    rewards: Mapping[str, float]


def write_samples(path: str | Path, samples: Sequence[Sample], *, title: str = "Samples") -> None:
    """Writes a Markdown table, whole texts, one row a sample.

    Args:
        path: the file; its folder is created.
        samples: the rows.
        title: the heading above the table.
    """
    rewards = _reward_names(samples)
    head = ["prompt", "completion", "gold", *rewards]
    lines = [f"# {title}", "", _row(head), _row(["---"] * len(head))]
    for sample in samples:
        texts = [_cell(text) for text in (sample.prompt, sample.completion, sample.gold)]
        lines.append(_row([*texts, *_numbers(sample, rewards)]))
    write_atomic(Path(path), ("\n".join(lines) + "\n").encode())


def print_samples(samples: Sequence[Sample], *, limit: int = 4, width: int = 48) -> None:
    """Prints a short table; with `rich` on a terminal in colour, else plain.

    Args:
        samples: the rows.
        limit: how many to print.
        width: characters kept of a prompt's end and of a completion's end, where the question
            and the answer stand.
    """
    rewards = _reward_names(samples)
    head = ["prompt", "completion", "gold", *rewards]
    rows = [
        [_tail(s.prompt, width), _tail(s.completion, width), s.gold, *_numbers(s, rewards)]
        for s in samples[:limit]
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in [head, *rows]:
            print(" | ".join(row))
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))  # `[` opens rich markup
    Console().print(table)


def _reward_names(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for name in sample.rewards))


def _numbers(sample: Sample, names: list[str]) -> list[str]:
    return [f"{sample.rewards[n]:.3g}" if n in sample.rewards else "" for n in names]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Text that stays one table cell and is shown as it is, tags such as <answer> included."""
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\r", "")):
        text = text.replace(old, new)
    return text.replace("\n", "<br>")


def _tail(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else "…" + text[1 - width :]
