"""Seconds and memory of a step of GRPO in closed form; `scaling.py` makes tables of them.

`docs/scaling.md` has the formulas. Peaks are those of `eqrl.sharding.plan.CHIPS`, architectures of
`eqrl.models.known`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from eqrl import models
from eqrl.sharding.plan import CHIPS, Chip
from eqrl.sharding.plan._gpu import PER_HOST
from eqrl.sharding.plan._tpu import tpu_slices


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
    """Chips, how many of them share a host, and what one sends to its neighbours a second."""

    chip: Chip
    count: int
    host: int
    link: float

    @classmethod
    def of(cls, name: str) -> "Slice":
        """By names as `--plan` takes them; a TPU has the links of a chip in its slice's corner."""
        kind, _, number = name.partition("-")
        chip = CHIPS[kind]
        assert chip.link_bytes_per_s is not None
        if chip.platform == "gpu":
            return cls(chip, int(number), PER_HOST, chip.link_bytes_per_s)
        where = tpu_slices(kind)[name]
        axes = zip(where.shape, where.torus, strict=True)
        links = sum(0 if size == 1 else 2 if torus else 1 for size, torus in axes)
        rate = chip.link_bytes_per_s * links / chip.ports
        return cls(chip, math.prod(where.shape), math.prod(where.host), rate)


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

    def gather(self) -> Work:
        """The copy of the weights for sampling: gathered, then laid out anew."""
        if not self.moved:
            return Work()
        whole = WEIGHT * self.size.total / self.sample.tensor
        before = WEIGHT * self.size.total / (self.train.fsdp * self.train.tensor)
        parts = max(self.train.fsdp * self.train.tensor // self.sample.tensor, 1)
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
        attended = rows * (batch.prompt + batch.completion + 1) * a.num_layers * a.num_heads
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


# --- choices --------------------------------------------------------------------------------------


def cuts(a: models.Architecture, where: Slice, rows: int) -> Iterator[Cut]:
    """Meshes for training: `tensor` within a host and between heads, no finer than the rows."""
    for tensor in range(1, where.host + 1):
        if where.count % tensor or a.num_kv_heads % tensor or a.ff_width % tensor:
            continue
        rest = where.count // tensor
        if rest <= rows:
            yield from (Cut(rest // f, f, tensor) for f in range(1, rest + 1) if rest % f == 0)


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

    found = list(cuts(a, where, batch.prompts))
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


def fitted(model: Model) -> Model | None:
    """With the fewest rollout passes and the largest micro-batch that fit, if any do."""
    capacity = model.slice.chip.hbm_bytes
    while model.sampling_memory() > capacity and model.prompts_here > 1:
        model = dataclasses.replace(model, passes=2 * model.passes)
    while model.update_memory() > capacity and model.micro > 1:
        model = dataclasses.replace(model, micro=model.micro // 2)
    return model if model.memory() <= capacity else None


def best(name: str, topology: str, batch: Batch) -> Model | None:
    """The step on the meshes of `--mesh auto`, if it fits."""
    a, where = models.known(name), Slice.of(topology)
    train = train_cut(a, where, batch)
    return fitted(Model(a, where, batch, train, sample_cut(a, where, train)))


def searched(name: str, topology: str, batch: Batch) -> Model | None:
    """The step on the pair of meshes that this model finds fastest."""
    a, where = models.known(name), Slice.of(topology)
    found = []
    for train in cuts(a, where, batch.prompts):
        whole = [t for t in range(1, where.count + 1) if where.count % t == a.num_kv_heads % t == 0]
        for sample in (train, *(Cut(where.count // t, 1, t) for t in whole)):
            found.append(fitted(Model(a, where, batch, train, sample)))
    return min((model for model in found if model), key=Model.seconds, default=None)
