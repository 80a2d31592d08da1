"""What numbers of a batch say of other numbers of it; none of it knows a whole plan."""

import functools
from collections.abc import Iterator, Mapping
from typing import TypeAlias


Numbers: TypeAlias = Mapping[str, int]


class Conflict(ValueError):
    """Numbers that contradict each other, and whose value to change first."""

    def __init__(self, sentence: str, *names: str):
        super().__init__(sentence)
        self.names = names


# whole = part * other part
_PRODUCTS = (
    ("sequences_per_step", "prompts_per_step", "samples_per_prompt"),
    ("sequences_per_pass", "prompts_per_pass", "samples_per_prompt"),
    ("sequences_per_step", "minibatches", "minibatch_sequences"),
    ("updates_per_step", "minibatches", "epochs"),
)


def products(known: dict[str, int]) -> None:
    """Adds what a product of two known numbers says, until nothing is new."""
    size = -1
    while size != len(known):
        size = len(known)
        for whole, *parts in _PRODUCTS:
            for part, other in (parts, parts[::-1]):
                if part in known and other in known:
                    known.setdefault(whole, known[part] * known[other])
                elif whole in known and part in known:
                    known[other] = known[whole] // known[part]
                if part in known and whole in known:
                    _check_product(known, whole, part, other)


def _check_product(known: Numbers, whole: str, part: str, other: str) -> None:
    actual = known[part] * known[other]
    if known[whole] == actual:
        return
    if known[whole] % known[part]:
        sentence = f"{part}={known[part]} must divide {whole}={known[whole]}"
    else:
        parts = f"{part}={known[part]} * {other}={known[other]}"
        sentence = f"{whole}={known[whole]} is not {parts} = {actual}"
    # How a step is cut is easier to change than what is in it.
    cuts = [name for name in (part, other) if name.startswith("minibatch")]
    raise Conflict(sentence, *cuts, whole)


def rules(known: Numbers) -> Iterator[tuple[str, int]]:
    """Numbers that follow from the known ones: the surest first, the defaults last."""

    rule = functools.partial(_follows, known)
    k = known
    if rule("processes"):
        yield "processes", 1
    if rule("row_shards"):
        yield "row_shards", _row_shards(k)
    if rule("sequences_per_device", "sequences_per_process"):
        shards = max(k["row_shards"] // k["processes"], 1)
        yield "sequences_per_device", max(k["sequences_per_process"] // shards, 1)
    # From the whole to its parts.
    if rule("prompts_per_pass", "prompts_per_step", "rollout_passes"):
        yield "prompts_per_pass", _prompts_per_pass(k)
    if rule("prompts_per_pass", "prompts_per_step", "sequences_per_device", "samples_per_prompt"):
        yield "prompts_per_pass", _prompts_per_pass(k)
    if rule("micro_batch_sequences", "minibatch_sequences"):
        if "accumulation_steps" in k or "micro_batch_sequences_per_device" in k:
            yield "micro_batch_sequences", _micro_batch(k)
    # From the parts to a whole that nothing else gives: all parts are taken as full.
    if rule("prompts_per_step", "rollout_passes", "prompts_per_pass"):
        yield "prompts_per_step", k["rollout_passes"] * k["prompts_per_pass"]
    if rule("sequences_per_pass", "sequences_per_device"):
        rows, unit = k["sequences_per_device"] * k["row_shards"], k.get("samples_per_prompt", 1)
        yield "sequences_per_pass", max(rows // unit, 1) * unit
    if "sequences_per_step" not in k and rule("minibatch_sequences", "accumulation_steps"):
        if "micro_batch_sequences" in k:
            yield "minibatch_sequences", k["accumulation_steps"] * k["micro_batch_sequences"]
        if "micro_batch_sequences_per_device" in k:
            size = k["micro_batch_sequences_per_device"] * k["row_shards"]
            yield "minibatch_sequences", k["accumulation_steps"] * size
    # The defaults: one pass, one update, one micro-batch.
    for name in ("epochs", "minibatches", "rollout_passes"):
        if rule(name):
            yield name, 1
    if rule("micro_batch_sequences", "minibatch_sequences"):
        yield "micro_batch_sequences", k["minibatch_sequences"]


def _follows(known: Numbers, name: str, *needs: str) -> bool:
    return name not in known and all(need in known for need in needs)


def _row_shards(known: Numbers) -> int:
    """From two numbers of which one is the other's share; else one for each process."""
    for whole, share, unit in (
        ("sequences_per_process", "sequences_per_device", known["processes"]),
        ("sequences_per_pass", "sequences_per_device", 1),
        ("micro_batch_sequences", "micro_batch_sequences_per_device", 1),
    ):
        if whole in known and share in known:
            return -(-known[whole] // known[share]) * unit
    return known["processes"]


def _prompts_per_pass(known: Numbers) -> int:
    """From the number of passes, which are balanced, or the rows a device has, which are filled."""
    prompts = known["prompts_per_step"]
    if "sequences_per_device" not in known or "samples_per_prompt" not in known:
        return -(-prompts // known["rollout_passes"])
    rows, shards = known["sequences_per_device"], known["row_shards"]
    samples = known["samples_per_prompt"]
    if "rollout_passes" in known:
        fewest = (rows - 1) * shards // samples + 1
        return max(-(-prompts // known["rollout_passes"]), fewest)
    return max(min(rows * shards // samples, prompts), 1)


def _micro_batch(known: Numbers) -> int:
    """From the rows a device has, or the number of micro-batches; whole rows on every device."""
    whole, shards = known["minibatch_sequences"], known["row_shards"]
    if known.get("accumulation_steps") == 1:
        return whole
    rows = known.get("micro_batch_sequences_per_device")
    if rows is None:
        rows = -(-whole // (known["accumulation_steps"] * shards))
    return min(rows * shards, whole)
