"""The predecessor's measured steps beside the model's, for `scaling.py`."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from step_cost import Batch, best


# The predecessor's runs of 128 sequences of 512 + at most 1,024 tokens (Qwen2.5-3B-Instruct, no
# reference model): chips, least and most seconds of a step, what they are.
MEASURED = (
    ("v6e", 8, 11.58, 13.63, "v6e-8"),
    ("v6e", 16, 10.04, 10.04, "v6e-16, fsdp=16"),
    ("v6e", 16, 18.63, 18.63, "v6e-16, data=4,fsdp=4"),
    ("v4", 4, 39.65, 64.79, "v4-8: 4 chips"),
)
MEAN = 230  # tokens of its completions: 25,227 to 35,149 of 128 sequences


def curve(kind: str, counts: list[int], ran: int) -> list[tuple[int, float]]:
    """Seconds of the predecessor's step in eqrl's programs, where it fits."""
    found = []
    batch = Batch(16, 8, 512, ran, reference=False)
    for count in counts:
        model = best("Qwen/Qwen2.5-3B", f"{kind}-{count * (2 if kind == 'v4' else 1)}", batch)
        if model is not None:
            found.append((count, model.seconds()))
    return found


def picture(path: pathlib.Path) -> None:
    figure = Figure(figsize=(7.5, 4.4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = {"v6e": "C0", "v4": "C3"}
    for kind, counts in (("v6e", [4, 8, 16, 32, 64]), ("v4", [4, 8, 16, 32])):
        for ran, style in ((1024, "-"), (MEAN, "--")):
            points = curve(kind, counts, ran)
            label = f"model, {kind}, {ran:,} tokens a completion"
            axes.plot(*zip(*points, strict=True), style, color=colors[kind], label=label, lw=1.4)
    markers = iter("os^D")
    for kind, count, low, high, label in MEASURED:
        axes.errorbar(
            [count], [(low + high) / 2], yerr=(high - low) / 2, fmt=next(markers), capsize=4,
            color=colors[kind], label=f"measured, predecessor: {label}", markersize=6,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel("chips")
    axes.set_ylabel("seconds a step")
    axes.set_title(
        "Qwen2.5-3B, 16 prompts x 8 samples, 512 + at most 1,024 tokens, no reference.\nLines: "
        "lower bounds of eqrl's programs. Points: "
        f"about {MEAN} tokens a completion (recorded on v6e-8 only)",
        fontsize=8.5,
        loc="left",
    )
    axes.grid(alpha=0.3)
    figure.subplots_adjust(left=0.08, right=0.56, top=0.88, bottom=0.11)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path)


def points() -> tuple[list[str], list[list[str]]]:
    """The picture's numbers: head and rows of a table."""
    rows = []
    for kind, count, low, high, label in MEASURED:
        full, mean = (curve(kind, [count], ran)[0][1] for ran in (1024, MEAN))
        span = f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"
        rows.append([label, span, f"{mean:.2f}", f"{full:.2f}", f"{low / mean:.1f}"])
    head = ["measured by the predecessor", "s", f"model, {MEAN} tokens", "model, 1,024"]
    return [*head, "measured, of the first"], rows
