"""The invariants of advantages, state and sampling, on random worlds; of the losses, see
`test_invariants_losses.py`. Numbers are those of `reference/algorithms.md`, Appendix B.

Every named algorithm and preset is built here with the fewest arguments and run in one program;
members come from the contract tables. So a new one is tested, and has to be classified, without a
change here. `test_contract*.py` has the same promises for each member alone, on one world.
"""

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members_factors import FACTORS
from members_transforms import TRANSFORMS

from eqrl import _advantages as signals, _losses as losses, algorithms, presets
from eqrl._types import Rollout, Scores
from eqrl.algorithms import Algorithm
from eqrl.samplers.decoder import _row_keys


ARGUMENTS = {"max_tokens": 4, "buffer": 2, "samples": 3, "k": 2}  # where there is no default
ROWS, TIME = 12, 7
SEEDS = [0, 1, 2]


def _named():
    libraries = [x for x in vars(presets).values() if inspect.ismodule(x)]
    for module in (algorithms, *libraries):
        if not module.__name__.startswith("eqrl."):
            continue  # what the import hook left there
        for name, build in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(build):
                continue
            if build.__module__.startswith(module.__name__):
                yield f"{module.__name__.split('.')[-1]}.{name}", build


def needed(build):
    """The arguments that a named algorithm cannot do without."""
    parameters = inspect.signature(build).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    return {name: ARGUMENTS[name] for name in free}


BUILDERS = dict(_named())
ALL = {name: build(**needed(build)) for name, build in BUILDERS.items()}
everything = pytest.mark.parametrize("name", ALL)


# --- random worlds --------------------------------------------------------------------------------


def random_groups(rng, rows, largest):
    """Ids of groups of 1 to `largest` rows, in shuffled order and under shuffled names."""
    sizes = []
    while sum(sizes) < rows:
        sizes.append(min(int(rng.integers(1, largest + 1)), rows - sum(sizes)))
    names = rng.permutation(rows)[: len(sizes)]
    return rng.permutation(np.repeat(names, sizes))


def random_mask(rng, rows, time):
    """Prompts of some tokens, ragged completions with gaps, some rows empty; and positions."""
    mask, positions = np.zeros((rows, time), bool), np.full((rows, time), -1)
    for row in range(rows):
        start, stop = rng.integers(0, 2), rng.integers(3, time + 1)
        positions[row, start:stop] = np.arange(stop - start)
        mask[row, start + 1 : stop] = rng.random(stop - start - 1) < 0.7
        mask[row, rng.integers(start + 1, stop)] = True
    mask[rng.permutation(rows)[: rng.integers(1, 2 + rows // 6)]] = False
    return mask, positions


def on_last(row, mask):
    """The row's number on its last masked token."""
    last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return np.where(last, row[:, None], 0.0)


def random_world(seed, *, rows=ROWS, time=TIME, largest=5) -> Any:
    """A signal of rewards on last tokens, a rollout with every field, and scores in float64."""
    rng = np.random.default_rng(seed)
    mask, positions = random_mask(rng, rows, time)
    normal = lambda scale: scale * rng.standard_normal((rows, time))  # noqa: E731
    sampled = -np.abs(normal(1.5))
    rewards = np.stack([rng.integers(0, 2, rows), rng.integers(0, 3, rows)], axis=1)
    old, values = sampled + normal(0.3), normal(1.0)
    fields = dict(
        tokens=rng.integers(0, 9, (rows, time)).astype(np.int32),
        mask=mask,
        positions=positions.astype(np.int32),
        logprobs=sampled,
        group=random_groups(rng, rows, largest).astype(np.int32),
        truncated=rng.random(rows) < 0.3,
        rewards=rewards.astype(float),
        old_logprobs=old,
        ref_logprobs=sampled + normal(0.5),
        values=values,
        version=rng.integers(0, 5, rows).astype(np.int32),
        old_entropy=rng.random((rows, time)),
        sum_pi_squared=rng.random((rows, time)),
        greedy_rewards=rng.standard_normal(rows),
    )
    predicted = (old + normal(0.3), np.abs(normal(1.0)), values + normal(0.3))
    with jax.enable_x64(True):  # the carriers take JAX arrays only; NumPy is easier to spoil
        fields, predicted = jax.tree.map(jnp.asarray, (fields, predicted))
        carriers = jax.device_get((Rollout(**fields), Scores(*predicted)))
    return on_last(rewards.sum(axis=1), mask), *carriers


def swap(module, **fields) -> Any:
    """The module with other arrays in some fields, unchecked."""
    where = lambda m: [getattr(m, name) for name in fields]  # noqa: E731
    return eqx.tree_at(where, module, [*fields.values()], is_leaf=lambda x: x is None)


def change(tree, *, token=None, row=None):
    """`token` on the float leaves `[batch time]`, `row` on `[batch]` and `[batch component]`."""

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        per_token = x.ndim == 2 and x.shape[1] > 2
        how = token if per_token else row
        return x if how is None else how(x)

    return jax.tree.map(one, tree)


# --- all algorithms in one program ----------------------------------------------------------------


@jax.jit
def _assign_all(signal, rollout):
    return {name: a.assign(signal, a.init(), rollout)[0] for name, a in ALL.items()}


@jax.jit
def _grade_all(scores, batches):
    grade = {name: jax.grad(ALL[name].loss, has_aux=True) for name in batches}
    return {name: grade[name](scores, batch) for name, batch in batches.items()}


def assign_all(signal, rollout):
    """The batch of every algorithm, in float64."""
    with jax.enable_x64(True):
        return jax.device_get(_assign_all(*jax.tree.map(jnp.asarray, (signal, rollout))))


def grade_all(scores, batches):
    """For every algorithm the gradient with respect to scores, and the metrics."""
    with jax.enable_x64(True):
        return jax.device_get(_grade_all(*jax.tree.map(jnp.asarray, (scores, batches))))


def study(signal, rollout, scores):
    batches = assign_all(signal, rollout)
    return batches, grade_all(scores, batches)


@functools.cache
def clean(seed):
    """Batches, gradients and metrics of all algorithms on a random world."""
    return study(*random_world(seed))


@jax.jit
def _transform_all(signal, rollout):
    pieces = [member.build() for member in TRANSFORMS]
    return {repr(piece): piece.update(signal, piece.init(), rollout)[0] for piece in pieces}


def transform_all(signal, rollout, *, dtype: Any = float):
    """What every transform of the table makes of a signal."""
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    with jax.enable_x64(dtype is float):
        arguments = jax.tree.map(lambda x: jnp.asarray(cast(x)), (signal, rollout))
        return jax.device_get(_transform_all(*arguments))


def member_world(seed):
    return random_world(seed, rows=40, time=6, largest=16)


@functools.cache
def transformed(seed):
    return transform_all(*member_world(seed)[:2])


MEMBERS = {repr(member): member for member in TRANSFORMS}
transforms = pytest.mark.parametrize("name", MEMBERS)


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def alike(a, b, tolerance=1e-9):
    return np.allclose(a, b, rtol=tolerance, atol=tolerance)


# --- 2. padding -----------------------------------------------------------------------------------

# Their weighting divides by all rows, empty ones too, as those libraries do: rows of padding shrink
# the step by the ratio of the numbers of rows, columns change nothing.
COUNT_EMPTY = {"trl.dr_grpo", "trl.luspo", "trl.rloo", "trl.sapo", "verl.geo_mean"}


def poison(tree, mask):
    """NaN and infinities wherever nothing may be read."""
    poisons = np.resize([np.nan, np.inf, -np.inf], mask.shape)
    live = mask.any(axis=1)
    return change(
        tree,
        token=lambda x: np.where(mask, x, poisons),
        row=lambda x: np.where(live, x.T, np.nan).T,
    )


@functools.cache
def poisoned(seed):
    signal, rollout, scores = random_world(seed)
    mask, rng = rollout.mask, np.random.default_rng(seed)
    tokens = np.where(mask, rollout.tokens, rng.integers(0, 9, mask.shape)).astype(np.int32)
    rollout = swap(poison(rollout, mask), tokens=tokens)
    return study(poison(signal, mask), rollout, poison(scores, mask))


@everything
def test_2_nothing_at_masked_places_is_read_forward_or_backward(name):
    for seed in SEEDS:
        (batches, graded), (dirty_batches, dirty) = clean(seed), poisoned(seed)
        mask = batches[name].rollout.mask
        for field in ("advantages", "weights", "share", "targets", "prepared"):
            pair = (getattr(dirty_batches[name], field), getattr(batches[name], field))
            jax.tree.map(np.testing.assert_array_equal, *pair)
        jax.tree.map(np.testing.assert_array_equal, dirty[name], graded[name])
        for leaf in jax.tree.leaves(dirty[name][0]):
            assert np.all(np.isfinite(leaf)) and np.all(leaf[~mask] == 0)
        assert np.any(dirty[name][0].logprobs != 0)


ROOM = (ROWS + 3, TIME + 2)


def places(seed) -> Any:
    """Where the rows and columns of a world stand in a larger one."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(big)[:n]) for big, n in zip(ROOM, (ROWS, TIME), strict=True)]


def widen(x, at, fill) -> Any:
    rows, columns = at
    shape = (ROOM[0], ROOM[1] if x.shape[1:] == (TIME,) else x.shape[-1])[: x.ndim]
    wide = np.full(shape, fill, x.dtype)
    wide[np.ix_(rows, columns) if shape[1:] == (ROOM[1],) else rows] = x
    return wide


@functools.cache
def padded(seed):
    signal, rollout, scores = random_world(seed)
    at = places(seed)
    wide = jax.tree.map(
        lambda x: widen(x, at, np.nan if x.dtype == float else 0), (signal, rollout, scores)
    )
    positions = widen(rollout.positions, at, -1)
    group = widen(rollout.group, at, rollout.group[0])  # rows of padding join a group
    wide_rollout = swap(wide[1], positions=positions, group=group)
    return study(wide[0], wide_rollout, wide[2])


@everything
def test_2_rows_and_columns_of_padding_change_nothing(name):
    for seed in SEEDS:
        (batches, graded), (wide_batches, wide) = clean(seed), padded(seed)
        at = places(seed)
        same(wide_batches[name].advantages, widen(batches[name].advantages, at, 0.0))
        factor = ROWS / ROOM[0] if name in COUNT_EMPTY else 1.0
        same(wide_batches[name].weights, widen(batches[name].weights * factor, at, 0.0))
        for a, b in zip(
            jax.tree.leaves(wide[name][0]), jax.tree.leaves(graded[name][0]), strict=True
        ):
            same(a, widen(b * factor, at, 0.0))
        for key, value in graded[name][1].items():  # parts of the loss are under the weights
            same(wide[name][1][key], value * (factor if key.startswith("loss/") else 1.0))


# --- 3. permutation -------------------------------------------------------------------------------


def shuffle_inside(rng, group):
    """An order of rows in which every group keeps its places."""
    order = np.arange(len(group))
    for one in np.unique(group):
        inside = np.flatnonzero(group == one)
        order[inside] = rng.permutation(inside)
    return order


@functools.cache
def permuted(seed, how):
    rng, world = np.random.default_rng(seed + 77), random_world(seed)
    group = world[1].group
    order = shuffle_inside(rng, group) if how == "samples" else rng.permutation(ROWS)
    signal, rollout, scores = jax.tree.map(lambda x: x[order], world)
    if how == "groups":
        names = rng.permutation(ROWS).astype(np.int32)
        rollout = swap(rollout, group=names[rollout.group])
    return order, study(signal, rollout, scores)


# They centre scores that a baseline has centred already: where a group has no signal the advantage
# is rounding noise around 0, and so is its sign, which the clip fractions count by.
CENTRED_TWICE = {
    "algorithms.gdpo", "trl.gdpo", "verl.gdpo", "predecessor.rloo", "predecessor.reinforce_pp",
    "algorithms.reinforce_pp_baseline", "openrlhf.reinforce_pp_baseline",
    "verl.reinforce_pp_baseline",
}  # fmt: skip


@everything
@pytest.mark.parametrize("how", ["samples", "groups"])
def test_3_order_of_samples_and_groups_is_only_an_order(name, how):
    for seed in SEEDS:
        batches, graded = clean(seed)
        order, (moved_batches, moved) = permuted(seed, how)
        assert np.any(order != np.arange(ROWS))
        same(moved_batches[name].advantages, batches[name].advantages[order])
        for a, b in zip(*map(jax.tree.leaves, (moved[name][0], graded[name][0])), strict=True):
            same(a, b[order])
        for key, value in graded[name][1].items():
            if not (name in CENTRED_TWICE and key.startswith("policy/clip_")):
                same(moved[name][1][key], value)


# These know of a row nothing but its score: exchanged scores exchange advantages.
OF_SCORES = {
    "group_norm", "group_center", "rloo", "gpg", "max_rl", "pass_at_k", "batch_norm",
    "batch_center", "ema_baseline",
}  # fmt: skip


def kind(name):
    return MEMBERS[name].builder.__name__


@pytest.mark.parametrize("name", [name for name in MEMBERS if kind(name) in OF_SCORES])
@pytest.mark.parametrize("seed", range(3))
def test_3_exchanged_scores_exchange_advantages(name, seed):
    signal, rollout, _ = member_world(seed)
    live, group = rollout.mask.any(axis=1), rollout.group
    order = shuffle_inside(np.random.default_rng(seed), np.where(live, group, -1))
    moved = on_last(signal.sum(axis=1)[order], rollout.mask)
    of_row = lambda x: np.where(rollout.mask, x, 0).sum(1) / np.maximum(rollout.mask.sum(1), 1)  # noqa: E731
    found = _exchanged(seed, moved.tobytes())[name]
    same(of_row(found), of_row(transformed(seed)[name])[order])


@functools.cache
def _exchanged(seed, raw):
    _, rollout, _ = member_world(seed)
    return transform_all(np.frombuffer(raw).reshape(rollout.mask.shape), rollout)


# --- 4. shift -------------------------------------------------------------------------------------

# Unchanged when every group's scores move by a number of its own ...
SHIFT_GROUPS = {
    "group_norm", "group_center", "rloo", "opo", "pass_at_k", "gdpo", "optimal_token_baseline",
}  # fmt: skip
# ... or only when all scores of the batch move by one number. All others change.
SHIFT_BATCH = {"batch_norm", "batch_center"}
BY_BATCH = {"group_norm(deviation='batch')"}  # its deviation is that of the whole batch's scores


def shifted_world(world, offset):
    """Every row's score, and its raw components, moved by `offset[row]`."""
    signal, rollout, scores = world
    rewards = rollout.rewards + offset[:, None] / 2
    moved = signal + on_last(offset, rollout.mask)
    return moved, swap(rollout, rewards=rewards), scores


def offsets(seed, rollout, scope):
    by_name = np.random.default_rng(seed + 5).uniform(-3, 3, len(rollout.group))
    return by_name[rollout.group] if scope == "groups" else np.full(len(rollout.group), 2.3)


@functools.cache
def members_shifted(seed, scope):
    world = member_world(seed)
    return transform_all(*shifted_world(world, offsets(seed, world[1], scope))[:2])


@transforms
def test_4_shift_of_members(name):
    unmoved = {
        scope: [alike(members_shifted(s, scope)[name], transformed(s)[name]) for s in SEEDS]
        for scope in ("groups", "batch")
    }
    by_group = kind(name) in SHIFT_GROUPS and name not in BY_BATCH
    assert unmoved["groups"] == [by_group] * len(SEEDS)
    by_batch = by_group or kind(name) in SHIFT_BATCH or name in BY_BATCH
    assert unmoved["batch"] == [by_batch] * len(SEEDS)


@functools.cache
def algorithms_shifted(seed):
    world = random_world(seed)
    return assign_all(*shifted_world(world, offsets(seed, world[1], "groups"))[:2])


# Exactly these see a shift of a group's rewards; all other named algorithms do not.
SEE_A_SHIFT = {
    # Their baseline is the batch's, the deviation is, or a part of the sum is of the batch.
    "algorithms.reinforce", "algorithms.lite_ppo", "trl.lite_ppo",
    "predecessor.reinforce", "predecessor.dapo",
    # No baseline from other rows at all, or one that the shift does not move.
    "algorithms.reinforce_pp", "openrlhf.reinforce_pp", "verl.reinforce_pp",
    "algorithms.remax", "verl.remax",
    *(f"{home}.ppo" for home in ("algorithms", "openrlhf", "predecessor", "trl", "tunix", "verl")),
    "algorithms.vapo",
    # Scores relative to the mean score, and scores that are not zero.
    "algorithms.max_rl", "algorithms.gpg", "verl.gpg",
}  # fmt: skip


def test_4_shift_of_algorithms():
    def moved(name, seed):
        before, after = clean(seed)[0][name], algorithms_shifted(seed)[name]
        return not alike(after.advantages, before.advantages)

    assert {name for name in ALL if any(moved(name, seed) for seed in SEEDS)} == SEE_A_SHIFT


# --- 5. scale -------------------------------------------------------------------------------------

# Multiplying all rewards by a positive number leaves these as they are, up to eps ...
SCALE_FREE = {"group_norm", "batch_norm", "whiten", "max_rl", "gdpo"}
# ... and multiplies these by it; values and greedy rewards are in units of rewards.
SCALE_ALONG = {
    "group_center", "rloo", "opo", "gpg", "pass_at_k", "remax", "component", "batch_center",
    "returns", "gae", "gae_adaptive", "turn_returns", "turn_gae", "add_values", "scale",
    "ema_baseline", "optimal_token_baseline", "as_score",
}  # fmt: skip


def degree(name):
    """1 if the member follows the scale, 0 if it does not see it, `None` if neither."""
    arguments = MEMBERS[name].arguments
    if arguments.get("deviation") == "others":
        return None  # where the others are equal the score is only centred
    if arguments.get("eps") is not None and kind(name) == "pass_at_k":
        return 0
    return 0 if kind(name) in SCALE_FREE else 1 if kind(name) in SCALE_ALONG else None


def scaled_world(world, factor):
    signal, rollout, scores = world
    fields = {f: factor * getattr(rollout, f) for f in ("rewards", "values", "greedy_rewards")}
    return factor * signal, swap(rollout, **fields), scores


@functools.cache
def members_scaled(seed, factor):
    return transform_all(*scaled_world(member_world(seed), factor)[:2])


@transforms
def test_5_scale_of_members(name):
    follows = lambda exponent: all(  # noqa: E731
        alike(members_scaled(seed, factor)[name], factor**exponent * transformed(seed)[name], 1e-4)
        for seed in range(8)
        for factor in (0.3, 7.41)
    )
    assert [follows(0), follows(1)] == [degree(name) == 0, degree(name) == 1]


@functools.cache
def algorithms_scaled(seed, factor):
    return assign_all(*scaled_world(random_world(seed), factor)[:2])


# A cost that is not in units of rewards stands in their chain: KL, length, or a clip. Tunix's DAPO
# has one too, but by default it begins at thousands of tokens.
OWN_UNITS = {
    "algorithms.dapo", "verl.dapo", "algorithms.rloo", "trl.rloo",
    "algorithms.reinforce_pp", "algorithms.reinforce_pp_baseline", "algorithms.ppo", "trl.ppo",
    "tunix.ppo",
    *(name for name in ALL if name.startswith("openrlhf.") and name != "openrlhf.grpo"),
}  # fmt: skip
ALONG = {
    "algorithms.dr_grpo", "trl.dr_grpo", "tunix.dr_grpo", "verl.dr_grpo", "verl.rloo",
    "algorithms.reinforce", "algorithms.remax", "verl.remax", "algorithms.opo", "verl.opo",
    "algorithms.gpg", "verl.gpg", "algorithms.pkpo",
}  # fmt: skip


def test_5_scale_of_algorithms():
    def follow(exponent):
        pairs = lambda seed: (algorithms_scaled(seed, 3.0), clean(seed)[0])  # noqa: E731
        return {
            name
            for name in ALL
            if all(
                alike(a[name].advantages, 3.0**exponent * b[name].advantages, 1e-3)
                for a, b in map(pairs, SEEDS)
            )
        }

    assert follow(1) == ALONG
    assert follow(0) == ALL.keys() - ALONG - OWN_UNITS


# --- 6. sums over groups --------------------------------------------------------------------------

SUM_TO_ZERO = {"group_norm", "group_center", "rloo", "gpg", "max_rl", "gdpo"}
# What compares rows of a group and yet does not sum to zero.
SUM_TO_MORE = {
    "opo",  # weighs by length: test_advantages_groups.py
    "pass_at_k",  # never negative
    "optimal_token_baseline",  # weighs by path
}
AGAINST_GROUPS = [
    name
    for name, m in MEMBERS.items()
    if m.build().min_group > 1 and (m.build().spreads or kind(name) == "gdpo")
]


def group_sums(advantages, rollout):
    """Sum over each group's live rows of the row's advantage, taken from its last token."""
    last = on_last(np.ones(len(advantages)), rollout.mask)
    return np.bincount(rollout.group, (advantages * last).sum(axis=1), minlength=len(advantages))


@pytest.mark.parametrize("name", AGAINST_GROUPS)
@pytest.mark.parametrize("seed", range(5))
def test_6_advantages_of_a_group_sum_to_zero(name, seed):
    _, rollout, _ = member_world(seed)
    sums = group_sums(transformed(seed)[name], rollout)
    zero = kind(name) in SUM_TO_ZERO and MEMBERS[name].arguments.get("deviation") != "others"
    assert zero or kind(name) in SUM_TO_MORE | {"group_norm"}
    assert alike(sums, np.zeros_like(sums)) == zero


@pytest.mark.parametrize("home", ["algorithms", "trl", "verl", "openrlhf"])
@pytest.mark.parametrize("seed", range(5))
def test_6_rloo_is_dr_grpo_times_n_over_n_minus_one(home, seed, x64):
    signal, rollout, _ = jax.tree.map(jnp.asarray, random_world(seed))
    live = np.asarray(rollout.mask).any(axis=1)
    count = np.bincount(rollout.group, live, minlength=ROWS)[rollout.group]
    found = {}
    for name in ("rloo", "dr_grpo"):
        build = BUILDERS[f"{home}.{name}"]
        off = {n: 0.0 for n in ("kl", "beta") if n in inspect.signature(build).parameters}
        found[name] = _advantages(build(**needed(build) | off), signal, rollout)
    factor = np.where(count > 1, count / np.maximum(count - 1, 1), 0)[:, None]
    same(found["rloo"], factor * found["dr_grpo"])
    same(group_sums(found["rloo"], rollout), np.zeros(ROWS))
    assert np.any(found["rloo"] != 0)


@jax.jit
def _advantages(algorithm, signal, rollout):
    return algorithm.assign(signal, algorithm.init(), rollout)[0].advantages


# --- 7. constant groups ---------------------------------------------------------------------------


def constant_world(seed, world):
    """Some groups, at random, score the same throughout; each a number of its own."""
    rng = np.random.default_rng(seed + 900)
    _, rollout, scores = world
    rows = len(rollout.group)
    value = np.where(rng.random(rows) < 0.3, 7.41, rng.choice([1e-3, 1.0, 1e4], rows))
    value = value * rng.choice([1.0, -1.0, rng.random(), 1 / 3], rows)
    flags = rng.random(rows) < 0.7
    first, second = np.argsort(np.bincount(rollout.group[rollout.mask.any(axis=1)]))[-2:]
    flags[first], flags[second] = True, False
    constant = flags[rollout.group]
    rewards = rng.random((rows, 2)) * 3
    rewards[constant] = np.stack([value, value[::-1]], axis=1)[rollout.group[constant]]
    rewards = rewards.astype(np.float32).astype(float)
    total = rewards.astype(np.float32).sum(axis=1).astype(float)
    return constant, (on_last(total, rollout.mask), swap(rollout, rewards=rewards), scores)


@functools.cache
def members_constant(seed):
    constant, (signal, rollout, _) = constant_world(seed, member_world(seed))
    return constant, transform_all(signal, rollout, dtype=np.float32)


@pytest.mark.parametrize("name", AGAINST_GROUPS)
def test_7_constant_groups_are_exactly_zero_in_float32(name):
    for seed in range(20):
        constant, found = members_constant(seed)
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name][constant], 0)
        assert np.any(found[name][~constant] != 0)


@pytest.mark.parametrize("name", [n for n, m in MEMBERS.items() if m.constant_is_zero])
def test_7_constant_batches_are_exactly_zero_in_float32(name):
    for seed in range(10):
        np.testing.assert_array_equal(_all_equal(seed)[name], 0)


@functools.cache
def _all_equal(seed):
    _, rollout, _ = member_world(seed)
    rng = np.random.default_rng(seed)
    value = np.float32(7.41 if seed == 0 else rng.normal() * 10 ** rng.uniform(-3, 4))
    rewards = np.full(rollout.rewards.shape, value / 2)
    total = on_last(np.full(len(rewards), value), rollout.mask)
    return transform_all(total, swap(rollout, rewards=rewards), dtype=np.float32)


# A constant group is not exactly 0 in these: a batch statistic moves it after the baseline, or it
# pays for KL or length. All others that see no shift of a group keep it at 0.
MOVED_LATER = {
    "algorithms.reinforce_pp_baseline", "verl.reinforce_pp_baseline", "verl.gdpo",
    "predecessor.rloo", "predecessor.reinforce_pp", "algorithms.gdpo", "trl.gdpo",
    "algorithms.rloo", "trl.rloo", "verl.dapo", "algorithms.dapo", "tunix.dapo",
    *(name for name in ALL if name.startswith("openrlhf.")),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    sorted((ALL.keys() - SEE_A_SHIFT - MOVED_LATER) | {"algorithms.lite_ppo", "algorithms.max_rl"}),
)
def test_7_constant_groups_are_exactly_zero_in_algorithms(name):
    for seed in SEEDS:
        constant, batches = _algorithms_constant(seed)
        np.testing.assert_array_equal(batches[name].advantages[constant], 0)


@functools.cache
def _algorithms_constant(seed):
    constant, world = constant_world(seed, random_world(seed))
    assert constant.any()
    return constant, assign_all(*world[:2])


# --- 9. generalised advantage estimation ----------------------------------------------------------


def steps_of(row_mask, row_positions, gap):
    return np.flatnonzero(row_mask if gap == "carry" else row_mask | (row_positions >= 0))


def loop(signal, rollout, gamma, lam, gap):
    """The recurrence, one token at a time; and the temporal differences it sums."""
    out, deltas = np.zeros(signal.shape), np.zeros(signal.shape)
    for row, mask in enumerate(rollout.mask):
        advantage = following = 0.0
        for t in steps_of(mask, rollout.positions[row], gap)[::-1]:
            reward, value = (signal[row, t], rollout.values[row, t]) if mask[t] else (0.0, 0.0)
            deltas[row, t] = reward + gamma * following - value
            advantage = deltas[row, t] + gamma * lam * advantage
            following, out[row, t] = value, advantage
    return np.where(rollout.mask, out, 0), np.where(rollout.mask, deltas, 0)


run = jax.jit(lambda transform, *world: transform.update(world[0], transform.init(), world[1])[0])


@pytest.mark.parametrize("gap", ["carry", "decay"])
@pytest.mark.parametrize("seed", range(4))
def test_9_limits_of_gae_and_the_loop(gap, seed, x64):
    signal, rollout, _ = random_world(seed, time=[7, 33, 150, 7][seed])
    signal = signal + np.random.default_rng(seed).standard_normal(signal.shape)
    gamma, lam = np.random.default_rng(seed).uniform(0.5, 1, 2).tolist()
    world = jax.tree.map(jnp.asarray, (signal, rollout))
    togo = run(signals.returns(gamma, gap=gap), *world)
    whole = run(signals.gae(gamma, 1.0, gap=gap), *world)
    same(np.where(rollout.mask, whole + rollout.values, 0), togo)
    for trade_off in (0.0, lam):
        expected, deltas = loop(signal, rollout, gamma, trade_off, gap)
        found = run(signals.gae(gamma, trade_off, gap=gap), *world)
        same(found, expected)
    same(run(signals.gae(gamma, 0.0, gap=gap), *world), deltas)


@pytest.mark.parametrize("seed", range(4))
def test_9_limits_of_the_other_estimators_with_values(seed, x64):
    signal, rollout, _ = jax.tree.map(jnp.asarray, random_world(seed))
    at = lambda transform: run(transform, signal, rollout)  # noqa: E731
    # A length of 1 / alpha is the least that lets lambda leave 0.
    same(at(signals.gae_adaptive(0.9, alpha=1 / TIME)), at(signals.gae(0.9, 0.0)))
    alike_ = at(signals.gae_adaptive(0.9, alpha=1e14))
    same(alike_, at(signals.gae(0.9, 1.0)))
    # Without gaps there is one turn, and a turn's advantage is its reward minus its first value.
    mask = rollout.mask & (jnp.cumsum(rollout.mask, axis=1) == 1)
    single = swap(rollout, mask=mask)
    same(
        run(signals.turn_gae(0.9, 0.3), signal, single), run(signals.gae(0.9, 0.3), signal, single)
    )


# --- 14. resume -----------------------------------------------------------------------------------

# Whole runs are resumed in test_training.py, and arbitrary trees in test_checkpoint.py; here, the
# states that estimators and factors keep. `Algorithm.assign` returns all three of them.


def stateful():
    for member in (*TRANSFORMS, *FACTORS):
        piece = member.build()
        if jax.tree.leaves(piece.init()):
            yield repr(piece), piece


STATEFUL = dict(stateful()) | {
    "adaptive in a product": losses.normalised(losses.adaptive_entropy(0.4, start=0.1))
    * losses.tis()
}


def with_state(piece):
    """An algorithm whose only state is that of the piece."""
    if hasattr(piece, "update"):
        return Algorithm(piece, losses.reinforce(), losses.token_mean(), target=piece)
    return Algorithm(signals.batch_center(), piece * losses.reinforce(), losses.token_mean())


@jax.jit
def _steps(algorithms_, states, worlds):
    """Two batches, one after the other, through every algorithm."""
    found = {}
    for name, algorithm in algorithms_.items():
        batches, state = [], states[name]
        for signal, rollout in worlds:
            batch, state = algorithm.assign(signal, state, rollout)
            batches.append((batch.advantages, batch.targets, batch.prepared))
        found[name] = batches, state
    return found


def test_14_states_resume_bit_for_bit(tmp_path):
    names = {type(piece).__name__ for piece in STATEFUL.values()}
    assert {"EmaBaseline", "AdaptiveKlPenalty", "AdaptiveEntropy", "Product"} <= names
    made = {name: with_state(piece) for name, piece in STATEFUL.items()}
    start = {name: algorithm.init() for name, algorithm in made.items()}
    cast = lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else x.dtype)  # noqa: E731
    worlds = [jax.tree.map(cast, random_world(seed)[:2]) for seed in range(4)]
    half = _steps(made, start, worlds[:2])
    states = {name: state for name, (_, state) in half.items()}
    whole = _steps(made, states, worlds[2:])
    for name, restored in _back_from_disk(tmp_path, states, start):
        again = _steps(made, restored, worlds[2:])
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), again, whole)
    for name in made:  # and the state matters
        fresh = _steps(made, start, worlds[2:])[name]
        leaves = zip(*map(jax.tree.leaves, (fresh, whole[name])), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in leaves), name


def _back_from_disk(folder, states, start):
    """The states through either kind of file, restored into states before the first batch."""
    eqx.tree_serialise_leaves(folder / "states.eqx", states)
    yield "equinox", eqx.tree_deserialise_leaves(folder / "states.eqx", start)
    pytest.importorskip("orbax.checkpoint")
    from eqrl.checkpoint import Checkpoints

    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.save(1, states, {})
    with Checkpoints(folder / "checkpoints") as checkpoints:
        yield "orbax", checkpoints.restore(start)[0]


# --- 15. sampling keys ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_15_no_two_rows_share_a_key_however_prompts_are_spread(seed):
    # test_decoder.py has the completions; here the keys, of more rows than one could sample.
    rng = np.random.default_rng(seed)
    ids = rng.choice(2**31 - 1, 64, replace=False)
    key = jax.random.fold_in(jax.random.key(seed), 3)
    row_keys = jax.jit(_row_keys, static_argnums=2)
    data = lambda part: np.asarray(  # noqa: E731
        jax.random.key_data(row_keys(key, jnp.asarray(ids[part], jnp.int32), 16))
    ).reshape(len(part), 16, -1)
    whole = data(np.arange(64))
    assert len(np.unique(whole.reshape(64 * 16, -1), axis=0)) == 64 * 16
    for processes in (2, 16):
        for part in np.array_split(rng.permutation(64), processes):
            np.testing.assert_array_equal(data(part), whole[part])
