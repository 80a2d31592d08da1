"""A step of GRPO on paper: seconds and memory against chips, model and length, in closed form.

    python bench/scaling.py

Arithmetic on published peaks (`eqrl.sharding.plan.CHIPS`) and architectures
(`eqrl.models.known`): nothing is compiled and no accelerator or its compiler is needed. Writes the
tables between the markers of `docs/scaling.md`, and `docs/images/scaling.png`. The page explains
the formulas.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple


os.environ.setdefault("JAX_PLATFORMS", "cpu")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from eqrl import models  # noqa: E402
from eqrl.sharding.plan import CHIPS, Chip  # noqa: E402


ROOT = pathlib.Path(__file__).resolve().parent.parent
GB, GIB = 1e9, 2**30
# Of a device's memory: what `mesh_choices` gives the state and its gradient, and what
# `examples/layout.py` gives the state and a copy of the weights for sampling.
STATE_SHARE, COPY_SHARE = 0.6, 0.75
# Times that arrays go through main memory, fitted to the compiled programs that the page compares
# with: attention scores in float32, the feed-forward's inner arrays and the residual stream in
# bfloat16, of one forward pass; what recomputing and the backward pass multiply these with; float32
# logits.
SCORES, INNER, RESIDUAL, TRAIN, LOGITS = 9, 5, 10, 3, 4
# An array of one layer that is not larger stays in a TPU's vector memory (128 MiB on v5e and v6e).
ON_CHIP = 2**27
# Bytes a parameter: bfloat16 weights, float32 masters and two moments, float32 gradient.
WEIGHT, MASTERS, GRADIENT = 2, 12, 4


class Cut(NamedTuple):
    """Sizes of a mesh's axes."""

    data: int
    fsdp: int
    tensor: int

    @property
    def rows(self) -> int:
        """Parts that the batch is cut into."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        named = zip(("data", "fsdp", "tensor"), self, strict=True)
        return ",".join(f"{name}={size}" for name, size in named if size > 1) or "data=1"


class Slice(NamedTuple):
    """Chips and how many of them share a host."""

    chip: Chip
    count: int
    host: int
    link: float

    @classmethod
    def of(cls, name: str) -> "Slice":
        """Of names as `--plan` takes them; a TPU's links as a chip in the slice's corner has."""
        kind, _, number = name.partition("-")
        chip, count = CHIPS[kind], int(number) // (2 if kind in ("v4", "v5p") else 1)
        assert chip.link_bytes_per_s is not None
        if chip.platform == "gpu":
            return cls(chip, count, 8, chip.link_bytes_per_s)
        axes = 2 if chip.ports == 4 or count == 4 else 3  # a v4-8 is flat: 2x2x1
        links = 2 * axes if count >= (256 if chip.ports == 4 else 64) else axes
        host = 8 if chip.ports == 4 and count == 8 else 4
        return cls(chip, count, host, chip.link_bytes_per_s * min(links, chip.ports) / chip.ports)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step is asked for; `ran` is how many tokens the longest completion had."""

    prompts: int
    samples: int
    prompt: int
    completion: int
    reference: bool = True
    ran: int | None = None

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def steps(self) -> int:
        return self.completion if self.ran is None else self.ran


class Size(NamedTuple):
    """Numbers of parameters and of a token's cache entries, from the architecture."""

    layers: float
    embedding: float
    total: float
    cache_bytes: float

    @classmethod
    def of(cls, a: models.Architecture) -> "Size":
        attention = 2 * a.width * a.head_dim * (a.num_heads + a.num_kv_heads)
        layers = a.num_layers * (attention + 3 * a.width * a.ff_width)
        embedding = a.vocab_size * a.width
        total = layers + embedding * (1 if a.tied else 2)
        return cls(layers, embedding, total, 2 * a.num_layers * a.num_kv_heads * a.head_dim * 2)


class Work(NamedTuple):
    """Of one device: FLOPs, bytes of main memory, bytes sent, seconds of sending."""

    flops: float = 0.0
    hbm: float = 0.0
    sent: float = 0.0
    links: float = 0.0

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> "Work":
        return Work(*(n * x for x in self))

    def seconds(self, chip: Chip) -> float:
        assert chip.bf16_flops is not None and chip.hbm_bytes_per_s is not None
        return max(self.flops / chip.bf16_flops, self.hbm / chip.hbm_bytes_per_s, self.links)


@dataclasses.dataclass(frozen=True)
class Model:
    """The programs of a step on one mesh for training and one for sampling."""

    a: models.Architecture
    slice: Slice
    batch: Batch
    train: Cut
    sample: Cut
    passes: int = 1
    micro: int = 4

    @property
    def size(self) -> Size:
        return Size.of(self.a)

    @property
    def moved(self) -> bool:
        return self.sample != self.train

    @property
    def prompts_here(self) -> int:
        """Prompts of a pass on one device, the padding to the mesh included."""
        return math.ceil(self.batch.prompts / self.passes / self.sample.rows)

    @property
    def rows_here(self) -> int:
        """Sequences of the step on one device of the training mesh."""
        return math.ceil(self.batch.sequences / self.train.rows)

    @property
    def micro_here(self) -> int:
        return min(self.micro, self.rows_here)

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.rows_here / self.micro_here)

    # --- exchanges

    def exchange(self, axis: str, cut: Cut, size: float, factor: float = 1.0) -> Work:
        """A ring over one axis of arrays of `size` bytes: `factor` 2 where the sum is everywhere.

        `tensor` is innermost, then `fsdp`; GPUs of a host share its adapters.
        """
        n = getattr(cut, axis)
        if n == 1:
            return Work()
        inner = {"tensor": 1, "fsdp": cut.tensor, "data": cut.tensor * cut.fsdp}[axis]
        sent = factor * size * (n - 1) / n
        chip, near = self.slice.chip, sent / self.slice.link
        hosts = max(min(n * inner // self.slice.host, n), 1)
        if chip.platform == "tpu" or hosts == 1:
            return Work(sent=sent, links=near)
        together = n // hosts
        assert chip.hosts_link_bytes_per_s is not None
        far = factor * size * (hosts - 1) / hosts / (together * chip.hosts_link_bytes_per_s)
        return Work(sent=sent, links=max(near if together > 1 else 0.0, far))

    def sums(self, cut: Cut, tokens: float, count: float) -> Work:
        """The residual stream summed over `tensor`, so often a layer."""
        size = tokens * self.a.width * 2
        return self.exchange("tensor", cut, size, 2.0).times(count * self.a.num_layers)

    # --- parts of programs, for `n` sequences of `t` tokens on a device

    def forward(self, cut: Cut, n: float, t: float) -> Work:
        """All layers, without weights' traffic and exchanges."""
        a, tokens = self.a, n * t
        scores = a.num_layers * n * a.num_heads * t * t / cut.tensor
        flops = 2 * tokens * self.size.layers / cut.tensor + 4 * scores * a.head_dim
        inner = 2 * tokens * a.ff_width / cut.tensor
        residual = 2 * tokens * a.width
        moved = SCORES * self.spilled(4 * scores / a.num_layers)
        moved += INNER * self.spilled(inner) + RESIDUAL * self.spilled(residual)
        return Work(flops, a.num_layers * moved)

    def spilled(self, size: float) -> float:
        """Bytes of an array that main memory sees."""
        return 0.0 if self.slice.chip.platform == "tpu" and size <= ON_CHIP else size

    def head(self, cut: Cut, tokens: float) -> Work:
        vocab = self.a.vocab_size / cut.tensor
        logits = self.spilled(4 * tokens * vocab)
        return Work(2 * tokens * vocab * self.a.width, LOGITS * logits)

    def weights(self, cut: Cut) -> float:
        """Bytes of the matrices that products read, gathered along `fsdp`."""
        return WEIGHT * (self.size.layers + self.size.embedding) / cut.tensor

    def gathered(self, cut: Cut, times: float) -> Work:
        """Weights gathered layer by layer: written and read; only read where they are whole."""
        size = self.weights(cut)
        sent = self.exchange("fsdp", cut, size)
        return sent.plus(Work(hbm=size * (2 if cut.fsdp > 1 else 1))).times(times)

    # --- programs

    def gather(self) -> Work:
        """The copy of the weights for sampling: gathered, then laid out anew."""
        if not self.moved:
            return Work()
        whole = WEIGHT * self.size.total / self.sample.tensor
        before = WEIGHT * self.size.total / (self.train.fsdp * self.train.tensor)
        parts = self.train.fsdp * self.train.tensor // self.sample.tensor
        sent = self.exchange("fsdp", Cut(self.train.data, parts, self.sample.tensor), whole)
        return sent.plus(Work(hbm=before + 3 * whole))

    def prefill(self) -> Work:
        """All prompts of a step, once each."""
        n, t = self.prompts_here, self.batch.prompt
        one = self.forward(self.sample, n, t).plus(self.gathered(self.sample, 1))
        return one.plus(self.sums(self.sample, n * t, 2)).times(self.passes)

    def token(self) -> Work:
        """One pass of the decode loop: weights, all slots of the cache, each prompt's once."""
        a, cut, batch = self.a, self.sample, self.batch
        rows = self.prompts_here * batch.samples
        slots = rows * batch.completion + self.prompts_here * batch.prompt
        cache = slots * self.size.cache_bytes / cut.tensor
        attended = rows * (batch.prompt + batch.completion) * a.num_layers * a.num_heads
        flops = 2 * rows * self.size.layers / cut.tensor + 4 * attended * a.head_dim / cut.tensor
        own = Work(flops, cache).plus(self.head(cut, rows)).plus(self.gathered(cut, 1))
        return own.plus(self.sums(cut, rows, 2))

    def decode(self) -> Work:
        """Until the longest completion ends; without prefill."""
        return self.token().times(self.batch.steps * self.passes)

    def scored(self) -> Work:
        """The reference's log-probs."""
        if not self.batch.reference:
            return Work()
        cut, n = self.train, self.micro_here
        t, trained = self.batch.prompt + self.batch.steps, self.batch.steps
        one = self.forward(cut, n, t).plus(self.head(cut, n * trained))
        one = one.plus(self.gathered(cut, 1)).plus(self.sums(cut, n * t, 2))
        return one.times(self.micro_batches)

    def update(self) -> Work:
        """Forward, layers recomputed, backward, for each micro-batch; then the optimizer."""
        a, cut, n = self.a, self.train, self.micro_here
        t, trained = self.batch.prompt + self.batch.steps, self.batch.steps
        forward, head = self.forward(cut, n, t), self.head(cut, n * trained)
        # The product that ends a layer need not be recomputed: its sum is what the next one keeps.
        last = 2 * n * t * a.num_layers * a.width * a.ff_width / cut.tensor
        one = Work(4 * forward.flops - last + 4 * head.flops, TRAIN * forward.hbm + 3 * head.hbm)
        gradient = GRADIENT * self.size.total / cut.tensor
        one = one.plus(self.gathered(cut, 3)).plus(self.sums(cut, n * t, 5))
        one = one.plus(self.exchange("fsdp", cut, gradient)).plus(Work(hbm=2 * gradient))
        one = one.plus(self.exchange("data", cut, gradient / cut.fsdp, 2.0))
        held = self.size.total / (cut.fsdp * cut.tensor)
        step = Work(hbm=held * (2 * (WEIGHT + MASTERS) + GRADIENT))
        return one.times(self.micro_batches).plus(step)

    def programs(self) -> dict[str, Work]:
        return {
            "weights for sampling": self.gather(),
            "prefill": self.prefill(),
            "decode": self.decode(),
            "reference": self.scored(),
            "update": self.update(),
        }

    def seconds(self) -> float:
        """Least time of a step: its programs one after another, each its roofline."""
        return sum(work.seconds(self.slice.chip) for work in self.programs().values())

    # --- memory of one device

    def state(self) -> float:
        """Weights, masters, moments, and the reference."""
        each = WEIGHT + MASTERS + WEIGHT * self.batch.reference
        return each * self.size.total / (self.train.fsdp * self.train.tensor)

    def copy(self) -> float:
        return WEIGHT * self.size.total / self.sample.tensor if self.moved else 0.0

    def cache(self) -> float:
        tokens = self.batch.samples * self.batch.completion + self.batch.prompt
        return self.prompts_here * tokens * self.size.cache_bytes / self.sample.tensor

    def sampling_memory(self) -> float:
        a, cut, batch = self.a, self.sample, self.batch
        rows = self.prompts_here * batch.samples
        logits = 2 * 4 * rows * a.vocab_size / cut.tensor
        scores = 3 * 4 * self.prompts_here * a.num_heads * batch.prompt**2 / cut.tensor
        return self.state() + self.copy() + max(self.cache() + logits, scores)

    def update_memory(self) -> float:
        """With the gradient twice, one residual stream a layer, and the insides of one layer."""
        a, cut, n = self.a, self.train, self.micro_here
        t = self.batch.prompt + self.batch.completion
        gradients = 2 * GRADIENT * self.size.total / (cut.fsdp * cut.tensor)
        scores = 3 * 4 * n * a.num_heads * t * t / cut.tensor
        kept = 2 * n * t * (a.num_layers * a.width + 4 * a.ff_width / cut.tensor)
        whole = (WEIGHT + GRADIENT) * self.size.embedding / cut.tensor
        return self.state() + gradients + scores + kept + whole

    def memory(self) -> float:
        return max(self.sampling_memory(), self.update_memory())


# --- choices ---------------------------------------------------------------------------------------


def cuts(a: models.Architecture, where: Slice, prompts: int) -> Iterator[Cut]:
    for tensor in range(1, where.host + 1):
        if where.count % tensor or a.num_kv_heads % tensor or a.ff_width % tensor:
            continue
        rest = where.count // tensor
        for fsdp in (f for f in range(1, rest + 1) if rest % f == 0):
            if rest <= max(prompts, 1):
                yield Cut(rest // fsdp, fsdp, tensor)


def train_cut(a: models.Architecture, where: Slice, batch: Batch) -> Cut:
    """As `eqrl.sharding.mesh_choices`: the smallest tensor that fits, then the fewest bytes."""
    size, capacity = Size.of(a), where.chip.hbm_bytes
    tokens = batch.sequences * (batch.prompt + batch.completion)
    micro = math.ceil(batch.sequences / (4 * where.count))

    def badness(cut: Cut):
        parts = cut.fsdp * cut.tensor
        held = (WEIGHT + MASTERS + GRADIENT) * size.total / parts
        sent = (3 * micro + 1) * WEIGHT * size.total / cut.tensor * (cut.fsdp - 1) / cut.fsdp
        sent += 2 * micro * WEIGHT * size.total / parts * (cut.data - 1) / cut.data
        crossed = 8 * a.num_layers * tokens * a.width * 2 / cut.rows
        sent += crossed * (cut.tensor - 1) / cut.tensor
        if held > STATE_SHARE * capacity:
            return True, held, -cut.tensor, 0.0
        return False, cut.tensor, sent, held

    found = list(cuts(a, where, max(batch.prompts, batch.sequences // micro)))
    return min(found, key=badness) if found else Cut(1, where.count, 1)


def sample_cut(a: models.Architecture, where: Slice, train: Cut) -> Cut:
    """As `examples/layout.py`: whole along fsdp, with the smallest tensor whose copy has room."""
    if train.fsdp == 1:
        return train
    size, tensor = Size.of(a), train.tensor
    held = (WEIGHT + MASTERS) * size.total / (train.fsdp * train.tensor)
    while where.count % tensor == 0 and a.num_kv_heads % tensor == 0:
        if held + WEIGHT * size.total / tensor <= COPY_SHARE * where.chip.hbm_bytes:
            return Cut(where.count // tensor, 1, tensor)
        tensor *= 2
    return train


def best(name: str, topology: str, batch: Batch) -> Model | None:
    """Meshes as `--mesh auto`; the fewest rollout passes and the largest micro-batch that fit."""
    a, where = models.known(name), Slice.of(topology)
    train = train_cut(a, where, batch)
    model = Model(a, where, batch, train, sample_cut(a, where, train))
    while model.sampling_memory() > where.chip.hbm_bytes and model.prompts_here > 1:
        model = dataclasses.replace(model, passes=2 * model.passes)
    while model.update_memory() > where.chip.hbm_bytes and model.micro > 1:
        model = dataclasses.replace(model, micro=model.micro // 2)
    return model if model.memory() <= where.chip.hbm_bytes else None


# --- an engine beside it ---------------------------------------------------------------------------


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


# --- tables ----------------------------------------------------------------------------------------

# What the compiled programs of `--plan v6e-8` say (jax 0.10.2, libtpu 0.0.42, 2026-11): TFLOP, GB of
# main memory, GB sent and seconds of one device; `None` where it was not kept.
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


def cell(model: Model | None) -> str:
    if model is None:
        return "no"
    step = model.seconds()
    tokens = model.batch.sequences * model.batch.completion / step / model.slice.count
    marks = "†" * (model.moved is False and model.sample.fsdp > 1)
    marks += f" p{model.passes}" if model.passes > 1 else ""
    marks += f" m{model.micro}" if model.micro < 4 else ""
    return f"{digits(step)}: {digits(tokens)}{marks}"


def steps(topologies: tuple[str, ...]) -> str:
    rows = [
        [name, *(cell(best(repo, t, weak(Slice.of(t).count))) for t in topologies)]
        for name, repo in NAMES.items()
    ]
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
        works["decode"] = works["decode"]
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
        found = [
            best(NAMES[name], topology, weak(Slice.of(topology).count, total - 512))
            for total in LENGTHS
        ]
        rows.append([f"{name} on {topology}", *(cell(model) for model in found)])
        rows.append(["decode, update: s", *(_halves(model) for model in found)])
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
    ("3B", "v6e-8", 1024, 1024), ("3B", "v6e-8", 1024, 256), ("3B", "v6e-8", 8192 - 512, 1024),
    ("7B", "h200-8", 1024, 1024), ("7B", "h200-8", 1024, 256), ("7B", "h200-8", 8192 - 512, 1024),
    ("32B", "v6e-64", 1024, 256), ("72B", "h100-64", 1024, 256),
)  # fmt: skip


def engines() -> str:
    rows = []
    for name, topology, longest, mean in CASES:
        count = Slice.of(topology).count
        model = best(NAMES[name], topology, weak(count, longest))
        if model is None:
            rows.append([f"{name} on {topology}", f"{mean:,} of {longest:,}", "no"])
            continue
        own, decode = model.seconds(), model.decode().seconds(model.slice.chip)
        waiting = with_engine(model, mean, refilled=False)
        filled = with_engine(model, mean, refilled=True)
        rows.append([
            f"{name} on {topology}", f"{mean:,} of {longest:,}", digits(own),
            f"{decode / own:.0%}", f"{own / waiting:.2f}", f"{own / filled:.2f}",
        ])  # fmt: skip
    head = ["", "tokens: mean of longest", "step s", "decode", "engine that waits, gain"]
    return table([*head, "engine that refills, gain"], rows)


def gathering() -> str:
    """A model whose copy for sampling has no room, and the mesh that gives it some."""
    auto = best(NAMES["72B"], "v6e-256", weak(256))
    assert auto is not None
    own = dataclasses.replace(auto, train=Cut(1, 256, 1), sample=Cut(32, 1, 8))
    rows = []
    for words, model in (("`auto`", auto), ("`--mesh fsdp=256/data=32,tensor=8`", own)):
        fits = model.memory() <= model.slice.chip.hbm_bytes
        rows.append([
            words, f"{model.train} / {model.sample}", digits(model.decode().seconds(auto.slice.chip)),
            digits(model.seconds()), f"{model.memory() / GIB:.1f}{'' if fits else ', does not fit'}",
        ])  # fmt: skip
    return table(["72B on v6e-256", "mesh: train / sample", "decode s", "step s", "GiB"], rows)


# --- picture ---------------------------------------------------------------------------------------

# The predecessor's runs of 128 sequences of 512 + at most 1,024 tokens (Qwen2.5-3B-Instruct, no
# reference model): chips, least and most seconds of a step, what they are.
MEASURED = (
    ("v6e", 8, 11.58, 13.63, "v6e-8, six runs of 100 steps"),
    ("v6e", 16, 10.04, 10.04, "v6e-16, fsdp=16"),
    ("v6e", 16, 18.63, 18.63, "v6e-16, data=4,fsdp=4"),
    ("v4", 4, 39.65, 64.79, "v4-8 (4 chips), four algorithms"),
)
MEAN = 230  # tokens of its completions: 25,227 to 35,149 of 128 sequences


def curve(kind: str, counts: list[int], ran: int) -> list[tuple[int, float]]:
    """Seconds of the predecessor's step in eqrl's programs, where it fits."""
    found = []
    batch = Batch(16, 8, 512, ran, reference=False)
    for count in counts:
        model = best(NAMES["3B"], f"{kind}-{count * (2 if kind == 'v4' else 1)}", batch)
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
        "Qwen2.5-3B, 16 prompts x 8 samples, 512 + at most 1,024 tokens, no reference\n"
        f"lines: lower bounds for eqrl; the measured completions had {MEAN} tokens on average",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    figure.subplots_adjust(left=0.08, right=0.56, top=0.88, bottom=0.11)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path)


# --- page ------------------------------------------------------------------------------------------


def points() -> str:
    """The picture's numbers."""
    rows = []
    for kind, count, low, high, label in MEASURED:
        full, mean = (curve(kind, [count], ran)[0][1] for ran in (1024, MEAN))
        span = f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"
        rows.append([label, span, f"{mean:.2f}", f"{full:.2f}", f"{low / mean:.1f}"])
    head = ["measured by the predecessor", "s", f"model, {MEAN} tokens", "model, 1,024"]
    return table([*head, "measured, of the first"], rows)


def pages() -> dict[str, str]:
    """The text between each pair of markers."""
    return {
        "plans": beside_plans(),
        "tpus": steps(TPUS),
        "gpus": steps(GPUS),
        "shares": shares(),
        "lengths": lengths(),
        "decoding": decoding(),
        "gathering": gathering(),
        "engines": engines(),
        "points": points(),
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
