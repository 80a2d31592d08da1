"""Batch semantics: any numbers that fix a step give the same plan, contradictions are named."""

import dataclasses
import pathlib
import random
import re

import pytest

from eqrl._score import parts_of
from eqrl.sharding import BatchPlan, batch, plan_batch


PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "batch.md"
SEEDS = range(40)


def any_plan(seed: int, *, padded: bool) -> BatchPlan:
    """A random plan; with `padded=False` everything divides everything."""
    draw = random.Random(seed)
    processes = draw.choice([1, 1, 2, 4])
    shards = processes * draw.choice([1, 2, 4])
    samples = draw.choice([1, 2, 3, 5, 8] if padded else [2, 4, 8])
    if padded:
        prompts = draw.randint(1, 24)
        per_pass = -(-prompts // draw.randint(1, prompts))
        whole = prompts * samples
        minibatches = draw.choice([n for n in range(1, whole + 1) if whole % n == 0])
        whole //= minibatches
        micro = draw.choice([whole, *range(shards, whole, shards)])
    else:
        per_pass = shards * draw.choice([1, 2])
        prompts = per_pass * draw.choice([1, 2, 4])
        minibatches = draw.choice([1, 2])
        micro = shards * draw.choice([1, 2])
        micro = min(micro, prompts * samples // minibatches)
    epochs = draw.choice([1, 2, 3])
    return BatchPlan(prompts, samples, per_pass, micro, minibatches, epochs, shards, processes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_table_and_the_table_without_any_one_number_give_the_plan_back(seed, padded):
    plan = any_plan(seed, padded=padded)
    table = plan.table()
    assert plan_batch(**table) == plan
    for name in table:
        if name != "processes":  # rows do not tell how many processes hold their devices
            rest = {other: value for other, value in table.items() if other != name}
            assert plan_batch(**rest) == plan, name


# One choice a line fixes the plan, if everything divides.
SPANS = (
    (
        ("prompts_per_step", "samples_per_prompt"),
        ("sequences_per_step", "samples_per_prompt"),
        ("sequences_per_step", "prompts_per_step"),
    ),
    (
        ("rollout_passes",),
        ("prompts_per_pass",),
        ("sequences_per_pass",),
        ("sequences_per_device",),
        ("sequences_per_process",),
    ),
    (("epochs", "minibatches"), ("epochs", "updates_per_step"), ("epochs", "minibatch_sequences")),
    (("micro_batch_sequences",), ("micro_batch_sequences_per_device",), ("accumulation_steps",)),
)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_numbers_that_fix_the_plan_give_the_same_plan(seed):
    plan, draw = any_plan(seed, padded=False), random.Random(seed)
    table = plan.table()
    for _ in range(20):
        names = sum((draw.choice(choices) for choices in SPANS), ("processes", "row_shards"))
        extra = tuple(name for name in table if draw.random() < 0.2)
        names = set(names + extra)
        assert plan_batch(**{name: table[name] for name in names}) == plan, sorted(names)


def test_passes_are_balanced_unless_a_device_is_to_have_more_rows():
    given = {"prompts_per_step": 12, "samples_per_prompt": 1, "rollout_passes": 3}
    assert plan_batch(**given).prompts_per_pass == 4
    assert plan_batch(**given, sequences_per_device=5).prompts_per_pass == 5


def test_a_step_can_be_built_up_from_its_parts():
    parts = {"row_shards": 8, "samples_per_prompt": 2}
    sizes = {"micro_batch_sequences_per_device": 1, "accumulation_steps": 4}
    assert plan_batch(**parts, **sizes).prompts_per_step == 16
    passes = {"rollout_passes": 3, "sequences_per_device": 4}
    assert plan_batch(**parts, **passes).prompts_per_step == 48


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_given_holds_or_is_refused(seed):
    """Random numbers, mostly contradictory: never a plan with another number than was given."""
    draw = random.Random(seed)
    held = refused = 0
    for _ in range(15):
        names = draw.sample(batch.QUANTITIES, draw.randint(2, 5))
        given = {name: draw.choice([1, 2, 3, 4, 6, 8, 16]) for name in names}
        try:
            plan = plan_batch(**given)
        except ValueError:
            refused += 1
            continue
        held += 1
        assert {name: plan.table()[name] for name in names} == given
    assert held + refused == 15


@pytest.mark.parametrize("name", batch.FORMULAS)
def test_one_number_that_contradicts_the_others_is_named_with_one_that_does_not(name):
    for seed in range(8):
        plan = any_plan(seed, padded=True)
        # The wish for a number of padded rows would be met by changing something else.
        table = {n: x for n, x in plan.table().items() if n == name or not n.startswith("padded")}
        table[name] += random.Random(seed).choice([1, 7, 1000])
        with pytest.raises(ValueError, match="nearest is") as error:
            plan_batch(**table)
        changed, value = nearest(error.value)
        assert plan_batch(**(table | {changed: value})).table()[changed] == value


def nearest(error: Exception) -> tuple[str, int]:
    found = re.search(r"; nearest is (\w+)=(\d+)$", str(error))
    assert found, error
    return found[1], int(found[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_sum_to_the_whole_and_padding_is_small(seed):
    plan = any_plan(seed, padded=True)
    prompts = list(range(plan.prompts_per_step))
    passes = [prompts[i :: plan.rollout_passes] for i in range(plan.rollout_passes)]
    assert sum(map(len, passes)) == plan.prompts_per_step
    assert max(map(len, passes)) <= plan.prompts_per_pass
    decoded = plan.rollout_passes * plan.sequences_per_device * plan.row_shards
    assert decoded == plan.sequences_per_step + plan.padded_rollout_sequences
    spare = plan.row_shards - 1
    assert (
        0
        <= plan.padded_rollout_sequences
        < plan.sequences_per_pass + (plan.rollout_passes * spare + 1)
    )
    assert plan.minibatch_sequences * plan.minibatches == plan.sequences_per_step
    full = plan.micro_batch_sequences_per_device * plan.row_shards
    assert 0 <= plan.padded_update_sequences < full
    assert plan.sequences_per_process % plan.sequences_per_device == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_update_runs_the_micro_batches_of_the_plan(seed):
    plan = any_plan(seed, padded=True)
    parts, rows = parts_of(plan.minibatch_sequences, plan.micro_batch_sequences, plan.row_shards)
    assert parts == plan.accumulation_steps
    assert rows == plan.minibatch_sequences + plan.padded_update_sequences


def test_two_hosts_of_four_devices():
    """The predecessor: 2 prompts x 8 samples and micro-batch 4, all a process."""
    plan = plan_batch(
        processes=2,
        row_shards=8,
        prompts_per_step=2 * 2,
        samples_per_prompt=8,
        micro_batch_sequences=2 * 4,
    )
    assert plan.accumulation_steps == 4
    assert plan.sequences_per_process == 2 * 8
    assert plan.padded_update_sequences == 0


def test_one_row_a_device():
    """The predecessor: global 16, per-device 1, n 2 -> batch 4, passes 2, micro and accum 4."""
    plan = plan_batch(
        processes=2,
        row_shards=8,
        prompts_per_step=16,
        samples_per_prompt=2,
        sequences_per_device=1 * 2,
        micro_batch_sequences_per_device=1,
    )
    assert plan.prompts_per_pass == 2 * 4
    assert plan.rollout_passes == 2
    assert plan.micro_batch_sequences == 2 * 4
    assert plan.accumulation_steps == 4


def test_a_prompt_too_few_for_the_devices_is_padded():
    """The predecessor: `Unable to shard batch=1 across local (dp,fsdp) shards=4`."""
    plan = plan_batch(prompts_per_step=1, samples_per_prompt=1, row_shards=4)
    assert plan.padded_rollout_sequences == plan.padded_update_sequences == 3


STEP = {"prompts_per_step": 2, "samples_per_prompt": 8}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            STEP | {"micro_batch_sequences": 5, "padded_update_sequences": 0},
            "micro_batch_sequences=5 on row_shards=1 must divide minibatch_sequences=16, because "
            "padded_update_sequences=0; nearest is micro_batch_sequences=4",
        ),
        (
            STEP | {"micro_batch_sequences": 4, "accumulation_steps": 3},
            "accumulation_steps=3 is not minibatch_sequences=16 / micro_batch_sequences=4, rounded "
            "up, = 4; nearest is accumulation_steps=4",
        ),
        (
            STEP | {"micro_batch_sequences": 5, "row_shards": 4},
            "micro_batch_sequences=5 is no multiple of row_shards=4; nearest is "
            "micro_batch_sequences=4",
        ),
        (
            STEP | {"sequences_per_step": 1000},
            "sequences_per_step=1000 is not prompts_per_step=2 * samples_per_prompt=8 = 16; "
            "nearest is sequences_per_step=16",
        ),
        (
            STEP | {"minibatches": 7},
            "minibatches=7 must divide sequences_per_step=16; nearest is minibatches=8",
        ),
        (
            STEP | {"rollout_passes": 3},
            "rollout_passes=3 is not prompts_per_step=2 / prompts_per_pass=1, rounded up, = 2; "
            "nearest is rollout_passes=2",
        ),
        (
            STEP | {"row_shards": 6, "processes": 4},
            "row_shards=6 do not spread evenly over processes=4; nearest is row_shards=4",
        ),
        (
            {"prompts_per_step": 2},
            "what is given does not fix the batch; give samples_per_prompt= too",
        ),
        (
            STEP | {"epochs": 0},
            "epochs=0 is too small; give at least epochs=1",
        ),
    ],
)
def test_what_errors_say(given, says):
    with pytest.raises(ValueError) as error:
        plan_batch(**given)
    assert str(error.value) == says
    assert type(error.value) is ValueError


def test_a_plan_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="prompts_per_pass=3 is more than prompts_per_step=2; nea"):
        BatchPlan(2, 8, 3, 16)
    plan = BatchPlan(2, 8, 2, 16)
    with pytest.raises(ValueError, match="minibatches=3 must divide sequences_per_step=16"):
        dataclasses.replace(plan, minibatches=3, micro_batch_sequences=1)


def test_no_quantity_is_a_batch_size():
    assert not [name for name in batch.QUANTITIES if "size" in name]


def test_the_page_has_one_row_for_each_quantity_with_its_formula():
    rows = re.findall(r"^\| `(\w+)` \|(.*\|.*\|.*\|.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert tuple(name for name, _ in rows) == batch.QUANTITIES
    for name, text in rows:
        if name in batch.FORMULAS:
            assert f"`{batch.FORMULAS[name]}`" in text, name
