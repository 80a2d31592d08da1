"""Dynamic sampling refills the batch, keeps shapes, and says what it did."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sampled_rollout

import eqrl


def _rounds(constant_groups):
    """`sample` whose round r has the given constant groups, out of three groups of two."""
    calls = []

    def sample(round):
        calls.append(round)
        rollout = sampled_rollout(round, groups=3, samples=2)
        rewards = np.tile([[0.0, 1.0], [1.0, 1.0]], (3, 1))
        for group in constant_groups[round]:
            rewards[2 * group : 2 * group + 2] = 1.0
        mask = rollout.mask.at[:, -4].set(True)
        return dataclasses.replace(rollout, rewards=jnp.asarray(rewards, jnp.float32), mask=mask)

    return sample, calls


def test_constant_groups_are_replaced_until_the_batch_is_full():
    sample, calls = _rounds([[0, 1], [2], []])
    rollout, metrics = eqrl.refill(sample, eqrl.drop_constant_groups(), 3, rounds=5)
    assert calls == [0, 1]
    assert rollout.tokens.shape == sample(0).tokens.shape
    assert np.asarray(rollout.group).tolist() == [0, 0, 2, 2, 4, 4]
    for group in (0, 2, 4):
        assert np.ptp(np.asarray(rollout.rewards)[group : group + 2, 0]) > 0
    want = [sample(0).tokens[4:6], sample(1).tokens[0:4]]
    np.testing.assert_array_equal(np.asarray(rollout.tokens), np.concatenate(want))
    assert metrics == {
        "select/rounds": 2.0,
        "select/dropped_frac": pytest.approx(0.5),
        "select/live_groups": 3.0,
    }


@pytest.mark.parametrize("live", [0, 1])
def test_when_rounds_run_out_empty_rows_stand_in(live):
    sample, calls = _rounds([[0, 1, 2], [0, 1, 2][live:]])
    rollout, metrics = eqrl.refill(sample, eqrl.drop_constant_groups(), 3, rounds=1)
    assert calls == [0, 1] and metrics["select/live_groups"] == live
    assert rollout.tokens.shape == sample(0).tokens.shape
    assert np.asarray(rollout.mask).any(axis=1).sum() == 2 * live


def test_a_row_whose_reward_failed_does_not_condemn_its_group():
    sample, _ = _rounds([[]])

    def broken(round):
        return eqrl.apply(sample(round), jnp.arange(6) != 1)

    def differs(rollout):
        return rollout.mask.any(axis=1)

    rollout, metrics = eqrl.refill(broken, differs, 3, rounds=0)
    assert metrics["select/live_groups"] == 3
    assert not np.asarray(rollout.mask)[1].any() and np.asarray(rollout.mask)[0].any()


def test_one_dropped_row_does_not_condemn_its_group():
    sample, calls = _rounds([[0], []])

    def truncated(round):
        flags = jnp.arange(6) == 5
        return dataclasses.replace(sample(round), truncated=flags & (round == 0))

    select = eqrl.drop_constant_groups() & eqrl.drop_truncated()
    rollout, metrics = eqrl.refill(truncated, select, 3, rounds=3)
    assert calls == [0, 1] and metrics["select/live_groups"] == 3
    # Groups 1 and 2 of the first round, whole, and the first group of the second.
    want = [sample(0).tokens[2:6], sample(1).tokens[0:2]]
    np.testing.assert_array_equal(np.asarray(rollout.tokens), np.concatenate(want))
    assert np.asarray(rollout.mask).any(axis=1).all()
