"""How many of everything: a step's sequences over passes, micro-batches and devices."""

import dataclasses
import re
from collections.abc import Callable

from ._batch_rules import Conflict, Numbers, products, rules


# Formula of each quantity that others fix, as it is printed in errors and in docs/batch.md.
# "/^" divides and rounds up.
FORMULAS = {
    "sequences_per_step": "prompts_per_step * samples_per_prompt",
    "rollout_passes": "prompts_per_step /^ prompts_per_pass",
    "sequences_per_pass": "prompts_per_pass * samples_per_prompt",
    "sequences_per_device": "sequences_per_pass /^ row_shards",
    "updates_per_step": "epochs * minibatches",
    "minibatch_sequences": "sequences_per_step / minibatches",
    "micro_batch_sequences_per_device": "micro_batch_sequences /^ row_shards",
    "accumulation_steps": "minibatch_sequences /^ micro_batch_sequences",
    "padded_rollout_sequences": (
        "rollout_passes * sequences_per_device * row_shards - sequences_per_step"
    ),
    "padded_update_sequences": (
        "accumulation_steps * micro_batch_sequences_per_device * row_shards - minibatch_sequences"
    ),
}


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """One training step in numbers; `plan_batch` makes one from any numbers that fix it.

    Global means summed over all processes and devices. Where sequences do not divide evenly, empty
    rows are added; they have no mask and change no statistic, gradient or metric.

    Args:
        prompts_per_step: different prompts sampled for one step, global.
        samples_per_prompt: completions of each prompt (the group size).
        prompts_per_pass: prompts that one call of the sampler decodes, global. The last pass of a
            step may have fewer.
        micro_batch_sequences: sequences of one forward and backward pass, global: a multiple of
            `row_shards`, or a whole minibatch. The last one of a minibatch may have fewer.
        minibatches: updates in one epoch; each takes an equal share of the step's sequences.
        epochs: how often every sequence of the step is trained on.
        row_shards: the parts that rows are cut into: the product of the sizes of the mesh axes
            that rows are spread over. Devices that share a row shard (a `tensor` axis) work on the
            same rows, so a number "per device" is a number per row shard.
        processes: JAX processes, over all hosts.

    Raises:
        ValueError: if the numbers contradict each other; names both, and the nearest valid one.
    """

    prompts_per_step: int
    samples_per_prompt: int
    prompts_per_pass: int
    micro_batch_sequences: int
    minibatches: int = 1
    epochs: int = 1
    row_shards: int = 1
    processes: int = 1

    def __post_init__(self):
        _settled(vars(self), _checked)

    @property
    def sequences_per_step(self) -> int:
        """Completions of one step, global."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def rollout_passes(self) -> int:
        """Calls of the sampler for the prompts of one step."""
        return -(-self.prompts_per_step // self.prompts_per_pass)

    @property
    def sequences_per_pass(self) -> int:
        """Completions one call of the sampler decodes, global."""
        return self.prompts_per_pass * self.samples_per_prompt

    @property
    def sequences_per_device(self) -> int:
        """Rows one device decodes in a pass, empty ones included."""
        return -(-self.sequences_per_pass // self.row_shards)

    @property
    def sequences_per_process(self) -> int:
        """Rows one process holds of a pass, empty ones included."""
        return self.sequences_per_device * max(self.row_shards // self.processes, 1)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one step's sequences."""
        return self.epochs * self.minibatches

    @property
    def minibatch_sequences(self) -> int:
        """Sequences whose gradient makes one update, global."""
        return self.sequences_per_step // self.minibatches

    @property
    def micro_batch_sequences_per_device(self) -> int:
        """Rows one device scores in a micro-batch, empty ones included."""
        return -(-self.micro_batch_sequences // self.row_shards)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches whose gradients add up to one update."""
        return -(-self.minibatch_sequences // self.micro_batch_sequences)

    @property
    def padded_rollout_sequences(self) -> int:
        """Empty rows decoded in one step, global, over all passes."""
        rows = self.rollout_passes * self.sequences_per_device * self.row_shards
        return rows - self.sequences_per_step

    @property
    def padded_update_sequences(self) -> int:
        """Empty rows scored in one update, global, over all micro-batches."""
        rows = self.accumulation_steps * self.micro_batch_sequences_per_device * self.row_shards
        return rows - self.minibatch_sequences

    def table(self) -> dict[str, int]:
        """Every quantity by name, in the order in which a step meets them."""
        return {name: getattr(self, name) for name in QUANTITIES}


QUANTITIES = (
    "prompts_per_step",
    "samples_per_prompt",
    "sequences_per_step",
    "processes",
    "row_shards",
    "rollout_passes",
    "prompts_per_pass",
    "sequences_per_pass",
    "sequences_per_process",
    "sequences_per_device",
    "padded_rollout_sequences",
    "epochs",
    "minibatches",
    "updates_per_step",
    "minibatch_sequences",
    "micro_batch_sequences",
    "micro_batch_sequences_per_device",
    "accumulation_steps",
    "padded_update_sequences",
)


def plan_batch(
    *,
    prompts_per_step: int | None = None,
    samples_per_prompt: int | None = None,
    sequences_per_step: int | None = None,
    processes: int | None = None,
    row_shards: int | None = None,
    rollout_passes: int | None = None,
    prompts_per_pass: int | None = None,
    sequences_per_pass: int | None = None,
    sequences_per_process: int | None = None,
    sequences_per_device: int | None = None,
    epochs: int | None = None,
    minibatches: int | None = None,
    updates_per_step: int | None = None,
    minibatch_sequences: int | None = None,
    micro_batch_sequences: int | None = None,
    micro_batch_sequences_per_device: int | None = None,
    accumulation_steps: int | None = None,
    padded_rollout_sequences: int | None = None,
    padded_update_sequences: int | None = None,
) -> BatchPlan:
    """The plan that has exactly the given numbers; every other one is derived.

    What nothing given fixes is 1 (processes, row shards, passes, epochs, minibatches, accumulation
    steps). Give `padded_update_sequences=0` to refuse padding instead of counting it.

    Args:
        prompts_per_step: this and every other argument is the quantity of that name of
            `BatchPlan`; `None` derives it.

    Raises:
        ValueError: if given numbers contradict each other, or leave the plan open.
    """
    # The first statement, so that `locals()` holds the arguments and nothing else.
    given = {name: value for name, value in locals().items() if value is not None}
    return BatchPlan(**_settled(given, _derived))


class _Open(ValueError):
    """Nothing contradicts, but something is missing."""


def _settled(given: Numbers, attempt: Callable[[Numbers], Numbers]) -> Numbers:
    """`attempt(given)`, its conflict told with the nearest value that would work."""
    for name, value in given.items():
        least = 0 if name.startswith("padded") else 1
        if not value >= least:
            raise ValueError(f"{name}={value} is too small; give at least {name}={least}")
    try:
        return attempt(given)
    except _Open as error:
        raise ValueError(str(error)) from None
    except Conflict as conflict:
        remedy = _remedy(conflict, given, attempt)
        raise ValueError(f"{conflict}; nearest is {remedy}" if remedy else str(conflict)) from None


def _remedy(conflict: Conflict, given: Numbers, attempt: Callable[[Numbers], Numbers]):
    """The nearest valid value of the number to change first, as `name=value`, if there is one."""
    # What the conflict blames may be derived itself; then some given number is to change, the
    # machine and the wish for no padding last.
    last = ("row_shards", "processes", *(name for name in given if name.startswith("padded")))
    others = sorted(reversed(list(given)), key=lambda name: name in last)
    names = [name for name in (*conflict.names, *others) if name in given]
    # Where one number cannot repair everything: one that agrees with those in the sentence.
    told = {name: given[name] for name in names if f"{name}=" in str(conflict)}
    pools = (given, {} if attempt is _checked or _works(attempt, told) else told)
    tries = (_nearest(name, pool, attempt) for pool in pools for name in names if name in pool)
    return next(filter(None, tries), None)


def _nearest(name: str, given: Numbers, attempt: Callable[[Numbers], Numbers]) -> str | None:
    """The value of one number, closest to the given one, with which all others are possible."""
    for distance in range(1, 65):
        for value in (given[name] - distance, given[name] + distance):
            if value >= 1 and _works(attempt, {**given, name: value}):
                return f"{name}={value}"
    rest = {other: value for other, value in given.items() if other != name}
    if attempt is not _derived or not _works(attempt, rest):
        return None
    try:  # far away, but what the others ask for
        return f"{name}={getattr(BatchPlan(**attempt(rest)), name)}"
    except _Open:
        return None


def _works(attempt: Callable[[Numbers], Numbers], numbers: Numbers) -> bool:
    try:
        attempt(numbers)
    except Conflict:
        return False
    except _Open:  # not enough for a plan, but no contradiction either
        return True
    return True


def _checked(fields: Numbers) -> Numbers:
    """The fields of a plan, which must not contradict each other."""
    sequences = fields["prompts_per_step"] * fields["samples_per_prompt"]
    minibatches, shards, processes = (
        fields[name] for name in ("minibatches", "row_shards", "processes")
    )
    if shards % processes and processes % shards:
        sentence = f"row_shards={shards} do not spread evenly over processes={processes}"
        raise Conflict(sentence, "row_shards", "processes")
    if sequences % minibatches:
        sentence = f"minibatches={minibatches} must divide sequences_per_step={sequences}"
        raise Conflict(sentence, "minibatches", "updates_per_step")
    limits = {
        "prompts_per_pass": ("prompts_per_step", fields["prompts_per_step"]),
        "micro_batch_sequences": ("minibatch_sequences", sequences // minibatches),
    }
    for name, (whole, size) in limits.items():
        if fields[name] > size:
            raise Conflict(f"{name}={fields[name]} is more than {whole}={size}", name)
    micro = fields["micro_batch_sequences"]
    if micro % shards and micro != sequences // minibatches:
        sentence = f"micro_batch_sequences={micro} is no multiple of row_shards={shards}"
        raise Conflict(sentence, "micro_batch_sequences")
    return fields


def _derived(given: Numbers) -> Numbers:
    """The fields of the plan that has the given numbers."""
    known = dict(given)
    products(known)
    while missing := next(rules(known), None):
        known[missing[0]] = missing[1]
        products(known)
    names = [field.name for field in dataclasses.fields(BatchPlan)]
    still_open = [name for name in names if name not in known]
    if still_open:
        raise _Open(f"what is given does not fix the batch; give {still_open[0]}= too")
    fields = _checked({name: known[name] for name in names})
    plan = BatchPlan(**fields)
    for name, value in given.items():
        if value != getattr(plan, name):
            raise _contradiction(plan, name, value)
    return fields


def _contradiction(plan: BatchPlan, name: str, value: int) -> Conflict:
    actual = getattr(plan, name)
    if name == "padded_update_sequences" and value == 0:
        micro, whole = plan.micro_batch_sequences, plan.minibatch_sequences
        sentence = (
            f"micro_batch_sequences={micro} on row_shards={plan.row_shards} must divide "
            f"minibatch_sequences={whole}, because padded_update_sequences=0"
        )
        return Conflict(sentence, "micro_batch_sequences", "accumulation_steps")
    formula = FORMULAS.get(name)
    if formula is None:
        return Conflict(f"{name}={value}, but the other numbers make it {actual}", name)
    numbers = re.sub("[a-z_]+", lambda match: f"{match[0]}={getattr(plan, match[0])}", formula)
    numbers = numbers.replace("/^", "/") + (", rounded up," if "/^" in formula else "")
    names = () if name.startswith("padded") else (name,)
    return Conflict(f"{name}={value} is not {numbers} = {actual}", *names)
