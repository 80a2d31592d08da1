"""Selections: which rows train, read from raw rewards and flags."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from eqrl._losses import token_mean
from eqrl._select import apply, drop_constant_groups, drop_truncated, selection


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
