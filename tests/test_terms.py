"""Ratios, surrogates and regularisers against NumPy loops, golden values and each other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles
import oracles_terms as loops
import pytest
from helpers import label
from worlds_terms import (
    RATIOS,
    REWEIGHTED,
    SMOOTH,
    build,
    masked_mean,
    ready,
    same_advantage,
    slope_of,
    table,
    world,
)

from eqrl import _losses as losses
from eqrl._losses.ratio import log_ratio


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments", SMOOTH + REWEIGHTED)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(name, arguments, seed, x64):
    scores, batch = world(seed)
    objective = build(name, arguments)
    value, metrics = objective(scores, ready(objective, batch))
    expected = getattr(loops, name)(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    [part] = [k for k in metrics if k.startswith("loss/")]
    total = np.sum(np.asarray(batch.weights) * expected)
    np.testing.assert_allclose(metrics[part], total, rtol=1e-12)


@pytest.mark.parametrize("name", RATIOS)
def test_ratio_equals_the_loop(name, x64):
    scores, batch = world()
    found = getattr(losses, name)()(scores, batch)
    np.testing.assert_allclose(found, loops.log_ratio(scores, batch, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, arguments", SMOOTH + REWEIGHTED)
def test_without_old_logprobs_the_ratio_is_one(name, arguments, x64):
    scores, batch = world()
    batch = dataclasses.replace(
        batch, rollout=dataclasses.replace(batch.rollout, old_logprobs=None)
    )
    objective = build(name, arguments)
    value, _ = objective(scores, ready(objective, batch))
    expected = getattr(loops, name)(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


def test_fractions_are_token_means(x64):
    scores, batch = world(3)
    a, delta = loops.advantage(batch), loops.delta(scores, batch)
    rho, new = np.exp(delta), np.exp(np.asarray(scores.logprobs))
    moved = new - new / rho
    around = losses.cispo_around_one(0.1, 0.2)
    cases = [
        (losses.cispo(1.1), "policy/clip_high_frac", rho > 1.1),
        (losses.cispo(1.1), "policy/weight", np.minimum(rho, 1.1)),
        (around, "policy/clip_low_frac", rho < 0.9),
        (around, "policy/clip_high_frac", rho > 1.2),
        (around, "policy/weight", np.clip(rho, 0.9, 1.2)),
        (losses.gmpo(0.2, 0.1), "policy/clip_low_frac", (delta < -0.2) & (a < 0)),
        (losses.gmpo(0.2, 0.1), "policy/clip_high_frac", (delta > 0.1) & (a > 0)),
        (losses.vespo(), "policy/weight", loops.vespo_weight(scores, batch)),
        (losses.dro(1.0), "policy/squared_ratio", delta**2 / 2),
        (losses.positive_nll(0.5), "policy/positive_frac", a > 0.5),
        (losses.dppo(0.05, 0.1), "policy/weight", loops.dppo_weight(scores, batch, 0.05, 0.1)),
        (
            losses.dppo(0.05, 0.1),
            "policy/masked_frac",
            np.where(a > 0, moved > 0.1, moved < -0.05),
        ),
    ]
    for objective, name, expected in cases:
        share = masked_mean(expected, batch)
        assert 0 < share
        np.testing.assert_allclose(objective(scores, batch)[1][name], share, rtol=1e-12)
    slope = loops.sapo_slope(scores, batch)
    weight = masked_mean(-slope / np.where(a == 0, 1, a), batch)
    np.testing.assert_allclose(losses.sapo()(scores, batch)[1]["policy/weight"], weight, rtol=1e-12)


# --- golden values of reference/algorithms.md, Appendix A -----------------------------------------

DELTA, MASK, SIGN = (
    [[0.3, -0.1, 0.2, 0], [-0.4, 0.1, 0, 0]],
    [[1, 1, 1, 1], [1, 1, 0, 0]],
    [[1], [-1]],
)


def golden(objective):
    value, metrics = objective(*table(DELTA, SIGN, MASK))
    return np.asarray(value), metrics


def test_golden_gspo(x64):
    ratio = np.exp(losses.geometric_ratio()(*table(DELTA, SIGN, MASK)))
    np.testing.assert_allclose(ratio[:, 0], [1.105171, 0.860708], atol=1e-6)
    objective = losses.clipped(3e-4, 4e-4, ratio=losses.geometric_ratio())
    value, _ = golden(objective)
    per_sequence = jnp.sum(losses.sequence_mean()(jnp.asarray(MASK, bool)) * value, axis=1) * 2
    np.testing.assert_allclose(per_sequence, [-1.0004, 0.9997], atol=1e-12)


@pytest.mark.parametrize(
    "bound, expected", [(0.4, [1.105171, 0.860708]), (0.2, [1.077884, 0.951229])]
)
def test_golden_gmpo(bound, expected, x64):
    value, _ = golden(losses.gmpo(bound, bound))
    np.testing.assert_allclose(-value[:, 0] * [1, -1], expected, atol=1e-6)
    np.testing.assert_array_equal(value, np.where(MASK, value[:, :1], 0))


def test_golden_sapo(x64):
    value, _ = golden(losses.sapo())
    gate = [[2.346333, 1.904909, 2.220503, 2.0], [1.578335, 2.009826, 0, 0]]
    np.testing.assert_allclose(-value * np.array(SIGN), gate, atol=1e-6)
    at_one, _ = losses.sapo()(*table([[0.0, 0.0]], [[1.0, -1.0]]))
    np.testing.assert_allclose(at_one, [[-2.0, 1.904762]], atol=1e-6)


@pytest.mark.parametrize(
    "objective, expected",
    [
        (losses.cispo(), [[1.349859, 0.904837, 1.221403, 1.0], [0.67032, 1.105171, 0, 0]]),
        (losses.cispo_around_one(), [[1.28, 0.904837, 1.221403, 1.0], [0.8, 1.105171, 0, 0]]),
    ],
    ids=repr,
)
def test_golden_cispo(objective, expected, x64):
    value, _ = golden(objective)
    np.testing.assert_allclose(-value * np.array(SIGN), expected, atol=1e-6)


@pytest.mark.parametrize(
    "weighting, expected",
    [
        (losses.token_sum(), 22.0),
        (losses.sequence_sum(count_empty=True), 7.333333333333333),
        (losses.sequence_mean(count_empty=True), 2.8333333333333335),
        (losses.constant_length(8, count_empty=True), 0.9166666666666666),
    ],
    ids=repr,
)
def test_golden_weightings(weighting, expected, x64):
    loss = jnp.array([[1.0, 2, 3, 4], [5, 7, 0, 0], [9, 9, 9, 9]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(jnp.sum(weighting(mask) * loss), expected, rtol=1e-14)


@pytest.mark.parametrize(
    "weighting, formula",
    [
        (losses.token_sum(), lambda length, live, rows: 1.0),
        (losses.sequence_mean(count_empty=True), lambda length, live, rows: 1 / length / rows),
        (losses.sequence_sum(count_empty=True), lambda length, live, rows: 1 / rows),
        (losses.constant_length(6, count_empty=True), lambda length, live, rows: 1 / rows / 6),
    ],
    ids=label,
)
def test_weighting_equals_the_loop(weighting, formula, x64):
    mask = oracles.world()[1].mask
    np.testing.assert_allclose(weighting(mask), loops.weights(mask, formula), rtol=1e-14)


# --- relations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIOS)
def test_a_completion_of_one_token_has_one_ratio(name, x64):
    scores, batch = world()
    mask = batch.rollout.mask & (jnp.cumsum(batch.rollout.mask, axis=1) == 1)
    batch = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, mask=mask))
    found, ppo = losses.clipped(ratio=getattr(losses, name)()), losses.clipped()
    np.testing.assert_allclose(found(scores, batch)[0], ppo(scores, batch)[0], rtol=1e-12)
    np.testing.assert_allclose(
        slope_of(found, scores, batch), slope_of(ppo, scores, batch), rtol=1e-12
    )


def test_gspos_two_forms_agree_for_one_advantage_per_completion(x64):
    scores, batch = same_advantage(*world())
    batch = dataclasses.replace(batch, weights=losses.sequence_mean()(batch.rollout.mask))
    forms = (losses.geometric_ratio(), losses.geometric_token_ratio())
    whole, token = (losses.clipped(0.05, 0.05, ratio=form) for form in forms)
    np.testing.assert_allclose(whole(scores, batch)[0], token(scores, batch)[0], rtol=1e-12)
    slope = slope_of(whole, scores, batch)
    held = (slope == 0).all(axis=1) & np.asarray(batch.rollout.mask).any(axis=1)
    assert held.any() and not held.all()  # whole completions are clipped
    np.testing.assert_allclose(slope, slope_of(token, scores, batch), rtol=1e-12, atol=1e-15)


def test_gspos_two_forms_differ_for_one_advantage_per_token(x64):
    scores, batch = world()
    forms = (losses.geometric_ratio(), losses.geometric_token_ratio())
    whole, token = (losses.clipped(0.9, 9.0, ratio=form) for form in forms)
    np.testing.assert_allclose(whole(scores, batch)[0], token(scores, batch)[0], rtol=1e-12)
    assert not np.allclose(slope_of(whole, scores, batch), slope_of(token, scores, batch))
    # The token form gives each token its own advantage, as `cispo` does without a cap.
    free = slope_of(losses.cispo(None, ratio=forms[0]), scores, batch)
    np.testing.assert_allclose(slope_of(token, scores, batch), free, rtol=1e-12, atol=1e-15)


def test_cispo_without_cap_is_reinforce_times_the_ratio(x64):
    scores, batch = world()
    rho = np.exp(log_ratio(scores, batch))
    expected = np.asarray(losses.reinforce()(scores, batch)[0]) * rho
    np.testing.assert_allclose(losses.cispo(None)(scores, batch)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(losses.cispo(1e9)(scores, batch)[0], expected, rtol=1e-12)


def test_an_offset_of_four_is_a_cap_of_five(x64):
    scores, batch = table([np.linspace(-3, 3, 41)], 1.0)
    offset, cap = losses.cispo_around_one(1.0, 4.0), losses.cispo(5.0)
    np.testing.assert_allclose(offset(scores, batch)[0], cap(scores, batch)[0], rtol=1e-12)
    shrunk, _ = losses.cispo(0.2)(scores, batch)  # the trap: no token keeps more than a fifth
    assert np.min(shrunk) == -0.2


def test_gmpo_without_bounds_is_gspo_without_clip(x64):
    scores, batch = world()
    wide = losses.clipped(1.0, 1e6, ratio=losses.geometric_ratio())
    np.testing.assert_allclose(
        losses.gmpo(99, 99)(scores, batch)[0], wide(scores, batch)[0], rtol=1e-12
    )


@pytest.mark.parametrize("k, decay", [(2.0, 3.0), (3.0, 2.0), (1.5, 1.5)])
def test_vespos_weight_is_one_at_one_and_largest_at_k_over_lambda(k, decay, x64):
    w = np.array([1.0, k / decay, k / decay * 0.99, k / decay * 1.01, 1e-8, 1e8])
    value, _ = losses.vespo(k, decay)(*table(np.log(w)[:, None], 1.0))
    weight = -np.asarray(value)[:, 0]
    np.testing.assert_allclose(weight[0], 1, rtol=1e-12)
    np.testing.assert_allclose(weight[1], np.exp(decay - k) * (k / decay) ** k, rtol=1e-12)
    assert np.all(weight[1] > weight[2:])


def test_vespo_clamps_the_log_of_the_product(x64):
    # A decay of 0 shows the clamp: w^k at -20, -20 and -19 nats.
    delta = [[-30.0, -30.0], [-10.0, -10.0], [-10.0, -9.0]]
    value, _ = losses.vespo(1.0, 0.0)(*table(delta, 1.0))
    np.testing.assert_allclose(-value[:, 0], np.exp([-20.0, -20.0, -19.0]), rtol=1e-12)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_drops_only_what_moved_the_rewarded_way(divergence, x64):
    old, new = np.log([0.3, 0.3, 0.6, 0.6]), np.log([0.6, 0.6, 0.3, 0.3])
    scores, batch = table((new - old)[None], [[1.0, -1.0, 1.0, -1.0]])
    batch = dataclasses.replace(
        batch, rollout=dataclasses.replace(batch.rollout, old_logprobs=jnp.asarray(old)[None])
    )
    scores = dataclasses.replace(scores, logprobs=jnp.asarray(new)[None])
    value, metrics = losses.dppo(0.1, 0.1, divergence=divergence)(scores, batch)
    np.testing.assert_allclose(value, [[0, 2.0, -0.5, 0]], rtol=1e-12)
    np.testing.assert_allclose(metrics["policy/masked_frac"], 0.5)
    # 0.7 log 2 nats and more are allowed: nothing is dropped.
    kept, _ = losses.dppo(0.5, 0.5, divergence=divergence)(scores, batch)
    assert np.all(np.asarray(kept) != 0)


def test_dppo_bounds_low_and_high_are_not_confused(x64):
    scores, batch = table([[0.5, -0.5]], [[1.0, -1.0]], old=-1.0)
    dropped = [np.asarray(losses.dppo(*bounds)(scores, batch)[0])[0] == 0 for bounds in
               [(0.01, 0.9), (0.9, 0.01)]]  # fmt: skip
    np.testing.assert_array_equal(dropped, [[False, True], [True, False]])


def test_binary_kl_survives_a_sure_token():
    scores, batch = table([[0.0, -1.0, 1.0]], [[1.0, -1.0, 1.0]], old=0.0, dtype=np.float32)
    value, _ = losses.dppo(divergence="kl")(scores, batch)
    assert np.all(np.isfinite(value))
    np.testing.assert_allclose(value[0, :2], [-1.0, 0.0])  # KL(1 || e^-1) = 1 nat: dropped


@pytest.mark.parametrize(
    "objective, value",
    [
        (losses.sapo(), [-4.0, 0.0, 4 / 1.05, 0.0]),
        (losses.cispo(), [-5.0, 0.0, 5.0, 0.0]),
        (losses.cispo_around_one(), [-1.28, 0.0, 1.28, 0.0]),
        (losses.dppo(), [0.0, 0.0, 20.0, 0.0]),
        (losses.vespo(), [0.0, 0.0, 0.0, 0.0]),
        (losses.clip_cov(1.0, low=-99, high=99), [0.0, 0.0, 0.0, 0.0]),  # all are chosen
    ],
    ids=repr,
)
def test_no_overflow_reaches_the_gradient(objective, value):
    # exp(200) is infinite in float32.
    rows = [[200.0], [200.0], [200.0], [200.0]]
    scores, batch = table(rows, [[1.0], [0.0], [-1.0], [0.0]], old=-1.0, dtype=np.float32)
    found, _ = objective(scores, ready(objective, batch))
    np.testing.assert_allclose(found[:, 0], value, rtol=1e-6)
    assert np.all(np.isfinite(slope_of(objective, scores, batch)))


def test_no_advantage_needs_no_ratio():
    scores, batch = table([[200.0, 0.0]], [[0.0, 1.0]], dtype=np.float32)
    for objective in (losses.cispo(None), losses.dppo(max_weight=None), losses.kl_cov(coef=0.0)):
        value, _ = objective(scores, ready(objective, batch))
        np.testing.assert_array_equal(value, [[0, -1]])
        np.testing.assert_array_equal(slope_of(objective, scores, batch), [[0, -1]])


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: losses.cispo(0), "max_weight=0"),
        (lambda: losses.cispo_around_one(1.5), "low=1.5"),
        (lambda: losses.cispo_around_one(0.2, -1), "high=-1"),
        (lambda: losses.sapo(0), "positive=0"),
        (lambda: losses.sapo(1, 0), "negative=0"),
        (lambda: losses.gmpo(-1), "low=-1"),
        (lambda: losses.gmpo(1, -1), "high=-1"),
        (lambda: losses.dppo(-1), "low=-1"),
        (lambda: losses.dppo(1, -1), "high=-1"),
        (lambda: losses.dppo(max_weight=0), "max_weight=0"),
        (lambda: losses.dppo(divergence="js"), "divergence='js'"),
        (lambda: losses.vespo(-1), "positive_power=-1"),
        (lambda: losses.vespo(negative_decay=-1), "negative_decay=-1"),
        (lambda: losses.dro(-1), "beta=-1"),
        (lambda: losses.clip_cov(0), "share=0"),
        (lambda: losses.clip_cov(epsilon=2), "epsilon=2"),
        (lambda: losses.clip_cov(seed=-1), "seed=-1"),
        (lambda: losses.kl_cov(2), "share=2"),
        (lambda: losses.kl_cov(coef=-1), "coef=-1"),
        (lambda: losses.positive_nll(float("nan")), "threshold=nan"),
    ],
)
def test_impossible_hyperparameters_are_refused(make, named):
    with pytest.raises(ValueError, match=f"^{named} .*; pass "):
        make()
