"""What a person at the terminal sees: one line a step, a bar, and rare notices."""

import io
import sys
from collections.abc import Mapping
from typing import SupportsFloat


# Label, then the metrics it may be called by; the first that is there is shown.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "reward": ("reward/mean", "train-reward/total/mean"),
    "correct": (
        "train-reward/func/reward_correct/mean",
        "reward/reward_correct/mean",
        "reward/correct/mean",
    ),
    "entropy": ("policy/entropy",),
    "len": ("completion/len_mean",),
    "grad": ("optim/grad_norm",),
    "s": ("time/train/step_s",),
}


class Console:
    """One line a step and one line an evaluation, in columns.

    On a terminal there is also a progress bar on stderr, if `rich` is installed.

    Args:
        total_steps: length of the run.
        first_step: the step a resumed run starts at.
        columns: label -> names of metrics, the first one present is shown; `None` for reward,
            correctness, entropy, length, gradient norm and seconds.
        file: where lines go; `None` for stdout.
        bar: whether to draw the bar; `None` if stderr is a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        columns: Mapping[str, tuple[str, ...]] | None = None,
        file: io.TextIOBase | None = None,
        bar: bool | None = None,
    ):
        self.total_steps = total_steps
        self._columns = _COLUMNS if columns is None else columns
        self._file = file
        self._seen: set[str] = set()
        self._width = len(str(total_steps))
        wanted = sys.stderr.isatty() if bar is None else bar
        self._bar, self._task = _bar(total_steps, first_step) if wanted else (None, None)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Prints what this call has of a step's numbers and of an evaluation's."""
        prefix = f"step {step:>{self._width}}/{self.total_steps}"
        words = [
            f"{label} {_short(metrics[name])}"
            for label, names in self._columns.items()
            if (name := next((name for name in names if name in metrics), None))
        ]
        if words:
            self._print("  ".join([prefix, *words]))
            self._advance(step)
        evaluation = [
            f"{name.removeprefix('eval/')} {_short(value)}"
            for name, value in metrics.items()
            if _is_headline(name)
        ]
        if evaluation:
            self._print("  ".join([f"{prefix}  eval: {evaluation[0]}", *evaluation[1:]]))

    def notice(self, key: str, text: str) -> None:
        """Prints a line the first time `key` comes, and nothing after that."""
        if key not in self._seen:
            self._seen.add(key)
            self._print(f"notice: {text}")

    def finish(self, status: str) -> None:
        """Takes the bar away."""
        del status
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        # sys.stdout is looked up now, not at construction: the bar replaces it on a terminal.
        print(line, file=self._file or sys.stdout, flush=True)

    def _advance(self, step: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)


def _is_headline(name: str) -> bool:
    # pass@1 is the accuracy again; everything else is in the other trackers.
    last = name.rsplit("/", 1)[-1]
    return name.startswith("eval/") and last.startswith(("acc", "pass@")) and last != "pass@1"


def _short(value: SupportsFloat) -> str:
    """Six columns at most for everyday numbers."""
    value = float(value)
    if value == 0 or 0.001 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:.1f}" if 100 <= abs(value) < 100_000 else f"{value:.1e}"


def _bar(total: int, completed: int):
    """A started progress bar and its task, or nothing without `rich`."""
    try:
        from rich.console import Console as RichConsole
        from rich.progress import Progress
    except ImportError:
        return None, None
    # rich moves redirected output above the bar; a stdout that is a file must stay a file.
    bar = Progress(
        *Progress.get_default_columns(),
        console=RichConsole(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
        transient=True,
    )
    bar.start()
    return bar, bar.add_task("training", total=total, completed=completed)
