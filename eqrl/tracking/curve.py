"""The picture of a run: reward and held-out accuracy against steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .jsonl import read_jsonl


_REWARD = ("reward/mean", "train-reward/total/mean")
# The first kind that was logged is drawn; `reward_correct` is the strict accuracy once more.
_EVAL = (("acc_strict", "acc_lenient", "accuracy"), ("reward_correct/mean",))


def draw_curve(
    jsonl_path: str | Path,
    png_path: str | Path,
    *,
    title: str = "eqrl",
    reward: str | None = None,
    evaluations: Sequence[str] | None = None,
) -> None:
    """Draws training reward (left axis) and held-out accuracy (right axis) as PNG.

    Works on the file of a run that is still going on, and on one without any evaluation.

    Args:
        jsonl_path: a file written by `Jsonl`.
        png_path: the picture; its folder is created.
        title: stands above the picture.
        reward: the metric on the left; `None` for the mean reward.
        evaluations: metrics on the right; `None` for the accuracies found under `eval/`.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    records = read_jsonl(jsonl_path)
    names = sorted({name for record in records for name in record})
    reward = reward or next((name for name in _REWARD if name in names), _REWARD[0])
    if evaluations is None:
        kinds = ([n for n in names if n.startswith("eval") and n.endswith(k)] for k in _EVAL)
        evaluations = next(filter(None, kinds), [])
    # Not `pyplot`: it keeps global state and would need a display backend.
    figure = figure_class(figsize=(7.5, 4.2), layout="constrained")
    canvas_class(figure)
    left = figure.add_subplot()
    left.set(title=title, xlabel="step", ylabel="training reward")
    left.grid(alpha=0.25)
    _draw_reward(left, *_series(records, reward))
    drawn = [(name, *_series(records, name)) for name in evaluations]
    drawn = [entry for entry in drawn if entry[1]]
    if drawn:
        _draw_evaluations(left.twinx(), drawn)
    handles, labels = [], []
    for axis in figure.axes:
        for found, into in zip(axis.get_legend_handles_labels(), (handles, labels), strict=True):
            into.extend(found)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)


def _matplotlib():
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'matplotlib is not installed; `pip install "eqrl[examples]"` to draw curves'
        ) from error
    return Figure, FigureCanvasAgg


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which `name` was logged as a finite number."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _draw_reward(axis, steps: list[int], values: list[float]) -> None:
    if not steps:
        return
    axis.plot(steps, values, color="tab:gray", alpha=0.4, linewidth=1, label="reward, each step")
    width = max(1, len(values) // 10)
    if width > 1:
        # A trailing mean: the picture of a partial run never changes when it goes on.
        smooth = [
            sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width)
            for i in range(len(values))
        ]
        axis.plot(steps, smooth, color="black", linewidth=1.8, label=f"reward, mean of {width}")


def _draw_evaluations(axis, drawn: list[tuple[str, list[int], list[float]]]) -> None:
    axis.set(ylabel="held-out accuracy", ylim=(0, 1))
    for index, (name, steps, values) in enumerate(drawn):
        label = f"{name.removeprefix('eval/')}: {values[0]:.3f} to {values[-1]:.3f}"
        axis.plot(steps, values, "o-", color=f"C{index}", markersize=4, label=label)
