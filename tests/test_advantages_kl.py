"""The pieces that hold the policy near its reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles_time
import pytest
from oracles_time import rows, run

from eqrl import _advantages as signals
from eqrl._parse import parse


def test_limit_of_the_kl_estimate(x64):
    d = [0.5, -0.5, 12.0, -12.0, 10.0]
    signal, rollout = rows(np.zeros((1, 5)), np.ones((1, 5)), logprobs=d, ref_logprobs=0.0)
    found = run(signals.kl_penalty(1.0, limit=10.0), signal, rollout)
    np.testing.assert_allclose(found, [[-0.5, 0.5, -10, 10, -10]], atol=1e-12)
    # The estimate is clamped, not the difference.
    found = run(signals.kl_penalty(1.0, estimator="k2", limit=10.0), signal, rollout)
    np.testing.assert_allclose(found, [[-0.125, -0.125, -10, -10, -10]], atol=1e-12)


@pytest.mark.parametrize("estimator, target", [("k1", 0.2), ("k2", 0.05), ("k3", 0.05)])
def test_adaptive_kl_penalty_equals_the_loop(estimator, target, x64):
    transform = signals.adaptive_kl_penalty(0.5, target=target, horizon=30, estimator=estimator)
    state = transform.init()
    assert float(state.coef) == 0.5 and state.coef.dtype == jnp.float32
    seen = set()
    for seed in range(5):
        signal, rollout = oracles_time.world(seed)
        # Near the target, so that not every correction is the largest one.
        ref = rollout.need("old_logprobs") - 0.1 * seed - 0.2 * rollout.need("values")
        rollout = dataclasses.replace(rollout, ref_logprobs=ref)
        before = float(state.coef)
        out, state = transform.update(signal, state, rollout)
        # The batch bears the coefficient from before its own update.
        expected = oracles_time.kl_penalty(signal, rollout, before, estimator)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
        after = oracles_time.next_coef(rollout, before, target, 30, estimator)
        np.testing.assert_allclose(float(state.coef), after, rtol=1e-6)
        assert state.coef.dtype == jnp.float32
        seen.add(round(after / before, 6))
    # 9 live rows: the largest steps are 1 - 0.06 and 1 + 0.06.
    assert len(seen) >= 2 and all(0.94 <= ratio <= 1.06 for ratio in seen)


@pytest.mark.parametrize("kl, ratio", [(0.1, 1.0), (0.11, 1.1), (5.0, 1.2), (-5.0, 0.8)])
def test_adaptive_kl_penalty_by_hand(kl, ratio):
    # Ten rows of different lengths, the same divergence on every token, a horizon of ten rows.
    mask = np.arange(10) < 1 + np.arange(10)[:, None]
    signal, rollout = rows(np.zeros((10, 10)), mask, logprobs=kl, ref_logprobs=0.0)
    transform = signals.adaptive_kl_penalty(0.01, horizon=10)
    out, state = transform.update(signal, transform.init(), rollout)
    np.testing.assert_allclose(state.coef, 0.01 * ratio, rtol=1e-5)
    np.testing.assert_allclose(out, -0.01 * kl * mask, rtol=1e-6)


def test_adaptive_kl_penalty_weighs_rows_not_tokens():
    # Row means 0.3 and 0.1: their mean is twice the target 0.1; the token mean is 0.12.
    mask = np.array([[1] + [0] * 8, [1] * 9], bool)
    kl = np.where(np.arange(2)[:, None] == 0, 0.3, 0.1)
    signal, rollout = rows(np.zeros((2, 9)), mask, logprobs=kl, ref_logprobs=0.0)
    transform = signals.adaptive_kl_penalty(1.0, target=0.18, horizon=2)
    _, state = transform.update(signal, transform.init(), rollout)
    np.testing.assert_allclose(state.coef, 1 + 0.2 / 0.18 - 1, rtol=1e-5)


def test_adaptive_kl_penalty_keeps_its_coefficient_over_an_empty_batch():
    signal, rollout = oracles_time.world()
    transform = signals.adaptive_kl_penalty(0.3, horizon=20)
    _, state = transform.update(signal, transform.init(), rollout)
    assert float(state.coef) != float(transform.init().coef)
    empty = dataclasses.replace(rollout, mask=jnp.zeros_like(rollout.mask))
    out, after = transform.update(signal, state, empty)
    assert float(after.coef) == float(state.coef)
    np.testing.assert_array_equal(out, np.zeros_like(out))


def test_adaptive_kl_penalty_counts_live_rows_only():
    signal, rollout = oracles_time.world()
    transform = signals.adaptive_kl_penalty(0.3, horizon=20)
    live = np.asarray(rollout.mask).any(axis=1)
    part = jax.tree.map(lambda x: x[live], rollout)
    _, whole = transform.update(signal, transform.init(), rollout)
    _, alone = transform.update(signal[live], transform.init(), part)
    np.testing.assert_allclose(whole.coef, alone.coef, rtol=1e-6)


def test_adaptive_kl_penalty_vmaps_over_its_numbers():
    signal, rollout = oracles_time.world()
    for name, values in {
        "coef": [0.1, 0.3],
        "target": [0.01, 5.0],
        "horizon": [10.0, 50.0],
    }.items():

        def twice(value, name=name):
            transform = signals.adaptive_kl_penalty(**{name: value}, estimator="k3")
            _, state = transform.update(signal, transform.init(), rollout)
            return transform.update(signal, state, rollout)

        out, state = jax.vmap(twice)(jnp.asarray(values))
        for k, value in enumerate(values):
            one, one_state = twice(value)
            np.testing.assert_allclose(out[k], one, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(state.coef[k], one_state.coef, rtol=1e-5)
        assert float(state.coef[0]) != float(state.coef[1])


def test_adaptive_kl_penalty_prints_and_compares():
    transform = signals.adaptive_kl_penalty(0.2, target=0.5, estimator="k3")
    assert repr(transform) == "adaptive_kl_penalty(coef=0.2, target=0.5, estimator='k3')"
    assert parse(repr(transform)) == transform
    assert repr(signals.adaptive_kl_penalty()) == "adaptive_kl_penalty()"
    assert transform != signals.adaptive_kl_penalty(0.2, target=0.5)
    assert (transform | signals.rloo()).requires == {"ref_logprobs"}


def test_kl_shaping_keeps_the_batchs_sum(x64):
    signal, rollout = oracles_time.world()
    found = run(signals.kl_shaping(0.7), signal, rollout)
    before = np.sum(np.asarray(signal)[np.asarray(rollout.mask)])
    np.testing.assert_allclose(np.sum(found), before, atol=1e-12)


def test_kl_shaping_leaves_equal_differences_alone():
    mask = jnp.zeros((15, 8), bool).at[:, 3:6].set(True).at[7].set(False)
    signal, rollout = rows(7.41, mask, dtype=jnp.float32, logprobs=0.3, ref_logprobs=-0.1)
    np.testing.assert_array_equal(
        run(signals.kl_shaping(3.0), signal, rollout), jnp.where(mask, signal, 0)
    )
