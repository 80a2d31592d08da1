"""A step of GRPO on paper: seconds and memory against chips, model and length.

    python bench/scaling.py

Arithmetic, by `step_cost.py`: nothing is compiled, and no accelerator or its compiler is needed.
Writes the tables between the markers of `docs/scaling.md`, and `docs/images/scaling.png`. The page
explains the formulas.
"""

import dataclasses
import math
import os
import pathlib


os.environ.setdefault("JAX_PLATFORMS", "cpu")

from scaling_picture import picture, points  # noqa: E402
from step_cost import Batch, Cut, Model, Slice, Work, best, searched  # noqa: E402

from eqrl import models  # noqa: E402
from eqrl.sharding.plan import Chip  # noqa: E402


ROOT = pathlib.Path(__file__).resolve().parent.parent
GB, GIB = 1e9, 2**30

# --- tables ---------------------------------------------------------------------------------------

# What the compiled programs of `--plan v6e-8` say (jax 0.10.2, libtpu 0.0.42, 2026-11): of one
# device, TFLOP, GB of main memory, GB sent and seconds; `None` where it was not kept.
PLANS: dict[str, dict[str, tuple[float | None, float | None, float | None, float | None]]] = {
    "3B, 16 x 8, fsdp=8": {
        "weights for sampling": (None, 19.1, 5.4, 0.027),
        "prefill": (5.94, 11.8, None, 0.0072),
        "decode": (114, 6990, None, 4.26),
        "reference": (158, 1160, None, 0.71),
        "update": (592, 3120, 108, 1.90),
    },
    "7B, 128 x 8, fsdp=2,tensor=4": {
        "prefill": (110, 259, None, 0.158),
        "decode": (2040, 12400, None, 7.57),
        "reference": (2830, 7740, None, 4.8),
    },
}
QWEN = "Qwen/Qwen2.5-"
NAMES = {name: QWEN + name for name in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")}
NAMES["Llama 70B"] = "meta-llama/Llama-3.3-70B-Instruct"
TPUS = ("v6e-8", "v6e-16", "v6e-64", "v6e-256")
GPUS = ("h100-8", "h100-16", "h100-64", "h200-8", "h200-16", "h200-64")


def planned() -> dict[str, Model]:
    """The model of what `PLANS` was compiled for."""
    small, large = Batch(16, 8, 512, 1024), Batch(128, 8, 512, 1024)
    where = Slice.of("v6e-8")
    three, seven = models.known(NAMES["3B"]), models.known(NAMES["7B"])
    found = (
        Model(three, where, small, Cut(1, 8, 1), Cut(8, 1, 1)),
        Model(seven, where, large, Cut(1, 2, 4), Cut(2, 1, 4)),
    )
    return dict(zip(PLANS, found, strict=True))


def as_compiled(model: Model) -> dict[str, Work]:
    """The programs as they are compiled: prefill with one token after it, decode with prefill."""
    parts = model.programs()
    short = dataclasses.replace(model, batch=dataclasses.replace(model.batch, completion=1))
    decode = parts["prefill"].plus(parts["decode"])
    return {**parts, "prefill": parts["prefill"].plus(short.token()), "decode": decode}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def beside_plans() -> str:
    rows = []
    for (title, plan), model in zip(PLANS.items(), planned().values(), strict=True):
        works = as_compiled(model)
        for name, numbers in plan.items():
            work = works[name]
            ours = (
                work.flops / 1e12, work.hbm / GB, work.sent / GB, work.seconds(model.slice.chip)
            )  # fmt: skip
            cells = [
                "" if theirs is None else f"{digits(theirs)}: {own / theirs:.2f}"
                for theirs, own in zip(numbers, ours, strict=True)
            ]
            rows.append([title, name, *cells])
    return table(["plan", "program", "TFLOP", "GB of HBM", "GB sent", "seconds"], rows)


def weak(count: int, completion: int = 1024) -> Batch:
    """16 prompts with 8 samples for each 8 chips."""
    return Batch(2 * count, 8, 512, completion)


def cell(model: Model | None, mark: str = "") -> str:
    if model is None:
        return "no"
    step = model.seconds()
    tokens = model.batch.sequences * model.batch.completion / step / model.slice.count
    mark += "†" * (not model.moved and model.sample.fsdp > 1)
    mark += f" p{model.passes}" if model.passes > 1 else ""
    mark += f" m{model.micro}" if model.micro < 4 else ""
    return f"{digits(step)}: {digits(tokens)}{mark}"


def chosen(repo: str, topology: str) -> str:
    """On the meshes of `auto`; where nothing fits on them, on the best that do."""
    batch = weak(Slice.of(topology).count)
    auto = best(repo, topology, batch)
    return cell(searched(repo, topology, batch), "‡") if auto is None else cell(auto)


def steps(topologies: tuple[str, ...]) -> str:
    rows = [[name, *(chosen(repo, t) for t in topologies)] for name, repo in NAMES.items()]
    return table(["Qwen2.5", *topologies], rows)


SHOWN = (
    ("0.5B", "v6e-8"), ("3B", "v6e-8"), ("7B", "v6e-8"), ("14B", "v6e-16"), ("32B", "v6e-64"),
    ("3B", "h100-8"), ("7B", "h200-8"), ("32B", "h200-8"), ("72B", "h100-64"), ("72B", "h200-16"),
)  # fmt: skip


def shares() -> str:
    rows = []
    for name, topology in SHOWN:
        model = best(NAMES[name], topology, weak(Slice.of(topology).count))
        assert model is not None
        chip = model.slice.chip
        works = model.programs()
        each = [f"{work.seconds(chip):.2f}" for work in works.values()]
        limit = _limit(works["update"], chip)
        memory = f"{model.sampling_memory() / GIB:.0f} / {model.update_memory() / GIB:.0f}"
        cuts = f"{model.train} / {model.sample}"
        rows.append([f"{name} on {topology}", cuts, *each, limit, memory])
    head = ["", "mesh: train / sample", "weights", "prefill", "decode", "reference", "update"]
    return table([*head, "update is bound by", "GiB: sampling / update"], rows)


def _limit(work: Work, chip: Chip) -> str:
    assert chip.bf16_flops is not None and chip.hbm_bytes_per_s is not None
    times = {
        "compute": work.flops / chip.bf16_flops,
        "memory": work.hbm / chip.hbm_bytes_per_s,
        "links": work.links,
    }
    return max(times, key=lambda name: times[name])


LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def lengths() -> str:
    rows = []
    for name, topology in (("3B", "v6e-8"), ("3B", "h100-8"), ("3B", "h200-8")):
        batches = [weak(Slice.of(topology).count, total - 512) for total in LENGTHS]
        autos = [best(NAMES[name], topology, batch) for batch in batches]
        other = [searched(NAMES[name], topology, batch) for batch in batches]
        found = [(x, "") if x else (y, "‡") for x, y in zip(autos, other, strict=True)]
        rows.append([f"{name} on {topology}", *(cell(model, mark) for model, mark in found)])
        rows.append(["decode, update: s", *(_halves(model) for model, _ in found)])
        rows.append(["mesh", *(f"{m.train} / {m.sample}" if m else "" for m, _ in found)])
    return table(["prompt and completion", *(f"{n:,}" for n in LENGTHS)], rows)


def _halves(model: Model | None) -> str:
    if model is None:
        return ""
    chip = model.slice.chip
    return ", ".join(digits(work.seconds(chip)) for work in (model.decode(), model.update()))


def decoding() -> str:
    """What a token costs in a decode loop, and how many rows would share it."""
    rows = []
    for name, topology in SHOWN:
        model = best(NAMES[name], topology, weak(Slice.of(topology).count))
        assert model is not None and model.slice.chip.hbm_bytes_per_s is not None
        chip, batch = model.slice.chip, model.batch
        weights = model.weights(model.sample)
        row = (batch.completion + batch.prompt / batch.samples) * model.size.cache_bytes
        row /= model.sample.tensor
        here = model.prompts_here * batch.samples
        taken = model.state() + model.copy()
        spare = max(chip.hbm_bytes - taken, 0)
        alone = max(chip.hbm_bytes - weights, 0)
        rows.append([
            f"{name} on {topology}", digits(weights / GB), digits(here),
            f"{weights / (weights + here * row):.0%}", digits(weights / row), digits(spare / row),
            digits(alone / row), f"{model.state() / chip.hbm_bytes:.0%}",
            *(digits(n / chip_pass(model, n)) for n in (here, 4 * here)),
        ])  # fmt: skip
    head = ["", "GB of weights a token", "rows a chip", "of the traffic is weights"]
    head += ["rows at which half is", "rows that fit", "rows without a trainer", "state, of HBM"]
    return table([*head, "decode tok/s a chip", "with 4 times the rows"], rows)


def chip_pass(model: Model, rows: float) -> float:
    """Seconds of a pass of so many rows a device, times the devices that share a row's weights."""
    prompts = math.ceil(rows * model.sample.rows / model.batch.samples)
    batch = dataclasses.replace(model.batch, prompts=prompts)
    more = dataclasses.replace(model, batch=batch, passes=1)
    return more.token().seconds(model.slice.chip) * model.sample.tensor


CASES = (
    ("3B", "v6e-8", 1024, 1024), ("3B", "v6e-8", 1024, 256), ("3B", "v6e-8", 4096 - 512, 512),
    ("7B", "h200-8", 1024, 1024), ("7B", "h200-8", 1024, 256), ("7B", "h200-8", 4096 - 512, 512),
    ("32B", "v6e-64", 1024, 256), ("72B", "h100-64", 1024, 256),
)  # fmt: skip


def engines() -> str:
    rows = []
    for name, topology, longest, mean in CASES:
        count = Slice.of(topology).count
        model = best(NAMES[name], topology, weak(count, longest))
        if model is None:
            rows.append([f"{name} on {topology}", f"{mean:,} of {longest:,}", "no", *[""] * 4])
            continue
        own, decode = model.seconds(), model.decode().seconds(model.slice.chip)
        waiting = with_engine(model, mean, refilled=False)
        filled = with_engine(model, mean, refilled=True)
        rows.append([
            f"{name} on {topology}", f"{mean:,} of {longest:,}", digits(own),
            f"{decode / own:.0%}", f"{own / waiting:.2f}", f"{own / filled:.2f}",
            _split(name, topology, model),
        ])  # fmt: skip
    head = ["", "tokens: mean of longest", "step s", "decode", "engine that waits, gain"]
    return table([*head, "engine that refills, gain", "half of the chips each, gain"], rows)


def _split(name: str, topology: str, whole: Model) -> str:
    """Half of the chips sample while the other half trains on what was sampled a step before."""
    kind, _, count = topology.partition("-")
    half = best(NAMES[name], f"{kind}-{int(count) // 2}", whole.batch)
    if half is None:
        return "no"
    decode = half.decode().seconds(half.slice.chip)
    return f"{whole.seconds() / max(decode, half.seconds() - decode):.2f}"


def by_hand() -> str:
    """Meshes that `auto` takes, beside the fastest pair of all by this model."""
    rows = []
    for name, topology in (
        ("3B", "v6e-8"), ("7B", "v6e-8"), ("14B", "v6e-16"), ("32B", "v6e-64"), ("72B", "v6e-64"),
        ("72B", "v6e-256"), ("7B", "h200-8"), ("72B", "h100-64"),
    ):  # fmt: skip
        batch = weak(Slice.of(topology).count)
        auto, other = (find(NAMES[name], topology, batch) for find in (best, searched))
        assert auto is not None and other is not None
        both = [model.decode().seconds(model.slice.chip) for model in (auto, other)]
        # What each of the two exchanges a layer may take beside its bytes before the gain is gone.
        slack = (both[0] - both[1]) / (2 * auto.a.num_layers * batch.steps)
        more = other.sample.tensor > auto.sample.tensor
        times = [
            f"{digits(s)} of {digits(m.seconds())}"
            for s, m in zip(both, (auto, other), strict=True)
        ]
        cuts = [f"{m.train} / {m.sample}" for m in (auto, other)]
        rows.append([f"{name} on {topology}", *cuts, *times, f"{1e6 * slack:.0f} µs" * more])
    head = ["", "`auto`: train / sample", "fastest in the model", "`auto`: decode of step, s"]
    return table([*head, "fastest", "slack an exchange"], rows)


# --- an engine beside it --------------------------------------------------------------------------


def engine_pass(model: Model, mean: float) -> float:
    """Seconds of one token of all rows in an ideal engine on the same chips and cuts.

    It reads the filled part of the cache alone: half of a completion where all are equally long,
    the mean where lengths are spread exponentially, and never more than half of the longest.
    """
    filled = min(mean, model.batch.completion / 2)
    rows = model.prompts_here * model.batch.samples
    saved = rows * (model.batch.completion - filled) * model.size.cache_bytes / model.sample.tensor
    token = model.token()
    return token._replace(hbm=token.hbm - saved).seconds(model.slice.chip)


def with_engine(model: Model, mean: float, *, refilled: bool) -> float:
    """Seconds of a step whose completions come from that engine.

    Args:
        model: the step.
        mean: tokens of a completion.
        refilled: finished rows make room for prompts of the next step, so no row waits. If not,
            the step waits for its longest completion, as one program does.
    """
    decode = model.decode().seconds(model.slice.chip)
    passes = model.passes * (mean if refilled else model.batch.steps)
    return model.seconds() - decode + passes * engine_pass(model, mean)


# --- page -----------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """The text between each pair of markers."""
    return {
        "plans": beside_plans(),
        "tpus": steps(TPUS),
        "gpus": steps(GPUS),
        "shares": shares(),
        "lengths": lengths(),
        "decoding": decoding(),
        "meshes": by_hand(),
        "engines": engines(),
        "points": table(*points()),
    }


def fill(text: str) -> str:
    """The page with its tables replaced."""
    for name, content in pages().items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n{content}\n<!-- end -->{after}"
    return text


def main() -> None:
    page = ROOT / "docs" / "scaling.md"
    page.write_text(fill(page.read_text()))
    picture(ROOT / "docs" / "images" / "scaling.png")


if __name__ == "__main__":
    main()
