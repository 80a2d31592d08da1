"""Selections: which rows train, read from raw rewards and flags."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import label

from eqrl import _select
from eqrl._losses import token_mean
from eqrl._parse import parse
from eqrl._select import (
    drop_constant_groups,
    drop_extreme_groups,
    drop_stale,
    drop_truncated,
    drop_unstopped,
)
from eqrl._select.base import apply, selection


def varied_groups(rollout):
    """By loops: the rows whose group differs in some component over its live rows."""
    live = np.asarray(rollout.mask).any(axis=1)
    group, rewards = np.asarray(rollout.group), np.asarray(rollout.rewards)
    keep = np.zeros(len(group), bool)
    for i in np.flatnonzero(live):
        peers = [tuple(rewards[j]) for j in np.flatnonzero(live) if group[j] == group[i]]
        keep[i] = len(set(peers)) > 1
    return keep


@pytest.mark.parametrize("seed", range(12))
def test_drop_constant_groups_equals_the_loop(seed):
    _, rollout = oracles.world(seed)
    rewards = jnp.asarray(np.random.default_rng(seed).random((11, 2)) < 0.2, float)
    rollout = dataclasses.replace(rollout, rewards=rewards)
    expected = varied_groups(rollout)
    np.testing.assert_array_equal(drop_constant_groups()(rollout), expected)
    np.testing.assert_array_equal(jax.jit(drop_constant_groups())(rollout), expected)


def test_both_outcomes_occur():
    _, rollout = oracles.world()
    # Group 0 differs in the second component only, group 7 in a row that is empty or not at all.
    rewards = jnp.full((11, 2), 7.41).at[3, 1].set(0.0).at[5, 0].set(1.0)
    keep = drop_constant_groups()(dataclasses.replace(rollout, rewards=rewards))
    np.testing.assert_array_equal(np.flatnonzero(keep), [3, 7])


def test_drop_constant_groups_reads_raw_rewards():
    _, rollout = oracles.world()
    with pytest.raises(ValueError, match=r"rollout\.rewards"):
        drop_constant_groups()(dataclasses.replace(rollout, rewards=None))


def test_drop_truncated_and_both():
    _, rollout = oracles.world()
    live = np.asarray(rollout.mask).any(axis=1)
    finished = ~np.asarray(rollout.truncated) & live
    assert 0 < finished.sum() < live.sum()
    np.testing.assert_array_equal(drop_truncated()(rollout), finished)
    both = drop_constant_groups() & drop_truncated()
    np.testing.assert_array_equal(both(rollout), finished & varied_groups(rollout))
    assert repr(both) == "drop_constant_groups() & drop_truncated()"


def test_apply_switches_off_the_mask_and_its_weights():
    _, rollout = oracles.world()
    keep = jnp.arange(11) % 2 == 0
    kept = apply(rollout, keep)
    expected = np.asarray(rollout.mask) & np.asarray(keep)[:, None]
    np.testing.assert_array_equal(kept.mask, expected)
    np.testing.assert_allclose(token_mean()(kept.mask), expected / expected.sum(), rtol=1e-6)
    assert kept.tokens is rollout.tokens
    assert dataclasses.replace(kept, mask=rollout.mask) == rollout


def shorter_than(rollout, *, limit):
    return jnp.sum(rollout.mask, axis=1) < limit


def test_a_users_selection_is_lifted_by_one_call():
    _, rollout = oracles.world()
    mine = drop_truncated() & selection(shorter_than, limit=5)
    assert repr(mine) == "drop_truncated() & shorter_than(limit=5)"
    short = np.asarray(rollout.mask).sum(axis=1) < 5
    np.testing.assert_array_equal(mine(rollout), np.asarray(drop_truncated()(rollout)) & short)


# --- every selection ------------------------------------------------------------------------------


def by_group(rollout, rule):
    """By loops: live rows whose group's live rows satisfy `rule`."""
    live = np.atleast_1d(np.any(np.asarray(rollout.mask), axis=1))
    group, rewards = np.asarray(rollout.group), np.asarray(rollout.rewards)
    rows = range(len(group))
    return np.array(
        [
            live[i] and rule(rewards[[j for j in rows if live[j] and group[j] == group[i]]])
            for i in rows
        ]
    )


def last_token(rollout, i):
    return int(rollout.tokens[i, np.flatnonzero(rollout.mask[i])[-1]])


def live_rows(rollout, rule):
    live = np.atleast_1d(np.any(np.asarray(rollout.mask), axis=1))
    return np.array([bool(live[i] and rule(i)) for i in range(len(live))])


def newest(rollout):
    return max(int(v) for v, m in zip(rollout.version, rollout.mask, strict=True) if m.any())


# Each selection, and what it keeps by a plain loop.
MEMBERS = [
    (drop_constant_groups(), lambda r: by_group(r, lambda x: np.any(np.ptp(x, axis=0) > 0))),
    (
        drop_constant_groups(tolerance=1.0),
        lambda r: by_group(r, lambda x: np.any(np.ptp(x, axis=0) > 1)),
    ),
    (drop_extreme_groups(), lambda r: by_group(r, lambda x: 0 < x[:, 0].mean() < 1)),
    (
        drop_extreme_groups(0.5, 1.6, component=1),
        lambda r: by_group(r, lambda x: 0.5 < x[:, 1].mean() < 1.6),
    ),
    (drop_truncated(), lambda r: live_rows(r, lambda i: not r.truncated[i])),
    (drop_unstopped(3), lambda r: live_rows(r, lambda i: last_token(r, i) == 3)),
    (
        drop_unstopped(1, 2, 3, 7),
        lambda r: live_rows(r, lambda i: last_token(r, i) in (1, 2, 3, 7)),
    ),
    (drop_stale(0), lambda r: live_rows(r, lambda i: r.version[i] == newest(r))),
    (drop_stale(2), lambda r: live_rows(r, lambda i: newest(r) - int(r.version[i]) <= 2)),
]
members = pytest.mark.parametrize("piece, loop", MEMBERS, ids=label)


@members
def test_equals_the_loop(piece, loop):
    kept = []
    for seed in range(8):
        _, rollout = oracles.world(seed)
        expected = loop(rollout)
        kept.append(expected)
        np.testing.assert_array_equal(piece(rollout), expected)
        np.testing.assert_array_equal(jax.jit(lambda s, r: s(r))(piece, rollout), expected)
    # Rows of both kinds were seen, empty ones aside.
    share = np.mean(kept)
    assert 0 < share < 9 / 11


@members
def test_selection_keeps_its_promises(piece, loop):
    del loop
    _, rollout = oracles.world(3)
    assert parse(repr(piece)) == piece
    kept = piece(rollout)
    assert kept.dtype == bool and not np.any(np.asarray(kept)[[5, 9]])
    # Selecting twice changes nothing.
    np.testing.assert_array_equal(piece(apply(rollout, kept)) & kept, kept)
    # The order of rows, the names of groups, and what empty rows hold do not matter.
    order = np.random.default_rng(1).permutation(11)
    empty = ~jnp.any(rollout.mask, axis=1)
    noisy = dataclasses.replace(
        rollout,
        rewards=jnp.where(empty[:, None], jnp.nan, rollout.need("rewards")),
        version=jnp.where(empty, 99, rollout.need("version")),
        group=10 - rollout.group,
    )
    moved = jax.tree.map(lambda x: x[order], noisy)
    np.testing.assert_array_equal(piece(moved), np.asarray(kept)[order])


def test_every_selection_has_a_row():
    public = {name for name in vars(_select) if name.startswith("drop_")}
    assert public == {repr(piece).split("(")[0] for piece, _ in MEMBERS}


def test_a_group_of_equal_middling_rewards_shows_the_difference():
    _, rollout = oracles.world()
    rollout = dataclasses.replace(rollout, rewards=jnp.full((11, 1), 0.5))
    assert not np.any(drop_constant_groups()(rollout))
    live = np.atleast_1d(np.any(np.asarray(rollout.mask), axis=1))
    np.testing.assert_array_equal(drop_extreme_groups()(rollout), live)
    # A mean of equal rewards is that reward, also where a float mean would not be.
    rollout = dataclasses.replace(rollout, rewards=jnp.full((11, 1), 7.41, jnp.float32))
    assert not np.any(drop_extreme_groups(0.0, 7.41)(rollout))
    assert not np.any(drop_extreme_groups(7.41, 9.0)(rollout))


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: drop_constant_groups(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: drop_extreme_groups(1.0, 1.0), "high=1.0"),
        (lambda: drop_extreme_groups(component=-1), "component=-1"),
        (lambda: drop_stale(-1), "max_age=-1"),
        (lambda: drop_unstopped(), "stop_ids"),
        (lambda: drop_extreme_groups(component=2)(oracles.world()[1]), "component=2"),
    ],
)
def test_impossible_arguments_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        build()
