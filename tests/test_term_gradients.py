"""Gradients of ratios, surrogates and regularisers: finite differences and closed forms."""

import dataclasses

import jax
import numpy as np
import oracles_terms as loops
import pytest
from jax.test_util import check_grads
from worlds_terms import (
    REWEIGHTED,
    SMOOTH,
    build,
    loss_of,
    ready,
    same_advantage,
    slope_of,
    table,
    world,
)

from eqrl import _losses as losses


# geometric_token_ratio is the value of one thing and the gradient of another.
@pytest.mark.parametrize(
    "name, arguments",
    [row for row in SMOOTH if row[1].get("ratio") != "geometric_token_ratio"],
)
def test_gradient_equals_finite_differences(name, arguments, x64):
    scores, batch = world()
    objective = build(name, arguments)
    batch = ready(objective, batch)
    function = jax.jit(lambda scores: loss_of(objective, scores, batch))
    check_grads(function, (scores,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


@pytest.mark.parametrize("name, arguments", REWEIGHTED)
def test_a_reweighted_term_has_the_gradient_of_reinforce_times_the_weight(name, arguments, x64):
    scores, batch = world()
    slope = slope_of(build(name, arguments), scores, batch)
    weight = getattr(loops, f"{name}_weight")(scores, batch, **arguments)
    reinforce = slope_of(losses.reinforce(), scores, batch)
    assert len(np.unique(weight)) > 3
    np.testing.assert_allclose(slope, weight * reinforce, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("positive, negative", [(1.0, 1.05), (3.0, 0.5)])
def test_sapo_gradient_in_closed_form(positive, negative, x64):
    scores, batch = world()
    slope = slope_of(losses.sapo(positive, negative), scores, batch)
    expected = loops.sapo_slope(scores, batch, positive, negative) * np.asarray(batch.weights)
    np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-15)


def test_gmpo_gradient_in_closed_form(x64):
    scores, batch = world()
    slope = slope_of(losses.gmpo(0.2, 0.1), scores, batch)
    expected = loops.gmpo_slope(scores, batch, 0.2, 0.1)
    assert np.any((expected == 0) & np.asarray(batch.rollout.mask))
    np.testing.assert_allclose(slope, expected, rtol=1e-12, atol=1e-14)


def test_the_squares_have_linear_gradients(x64):
    scores, batch = world()
    delta, a, w = loops.delta(scores, batch), loops.advantage(batch), np.asarray(batch.weights)
    square = slope_of(losses.squared_ratio(), scores, batch)
    np.testing.assert_allclose(square, w * delta, rtol=1e-12, atol=1e-15)
    dro = slope_of(losses.dro(0.7), scores, batch)
    np.testing.assert_allclose(dro, w * (0.7 * delta - a), rtol=1e-12, atol=1e-15)


def test_positive_nll_has_the_gradient_of_imitation(x64):
    scores, batch = world()
    slope = slope_of(losses.positive_nll(0.5), scores, batch)
    chosen = loops.advantage(batch) > 0.5
    np.testing.assert_array_equal(slope, np.where(chosen, -np.asarray(batch.weights), 0))


def test_positive_nll_means_above_and_not_at_the_threshold(x64):
    value, _ = losses.positive_nll(0.5)(*table([[-1.0, -1.0, -1.0]], [[0.5, 0.6, 0.4]]))
    np.testing.assert_array_equal(value, [[0, 1, 0]])


SURROGATES = [
    losses.clipped(ratio=losses.token_ratio()),
    losses.unclipped(),
    losses.cispo(),
    losses.cispo(None),
    losses.cispo(ratio=losses.geometric_ratio()),
    losses.cispo_around_one(),
    losses.sapo(),
    losses.sapo(3.0, 0.2),
    losses.dppo(),
    losses.dppo(0, 0, max_weight=None),
    losses.dppo(0, 0, divergence="kl"),
    losses.vespo(),
    losses.dro(0.3),
    losses.kl_cov(0.5),
    losses.clip_cov(high=1.0),  # no covariance is in (1, 1): nothing is chosen
]


@pytest.mark.parametrize("objective", SURROGATES, ids=repr)
@pytest.mark.parametrize("stored", [True, False])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(objective, stored, x64):
    scores, batch = world()
    old = scores.logprobs if stored else None
    batch = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, old_logprobs=old))
    expected = -loops.advantage(batch) * np.asarray(batch.weights)
    np.testing.assert_allclose(slope_of(objective, scores, batch), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "objective",
    [
        losses.clipped(3e-4, 4e-4, ratio=losses.geometric_ratio()),
        losses.clipped(3e-4, 4e-4, ratio=losses.geometric_token_ratio()),
        losses.gmpo(),
        losses.gmpo(0, 0),
    ],
    ids=repr,
)
def test_at_ratio_one_a_geometric_mean_shares_the_policy_gradient(objective, x64):
    # Under `sequence_mean` of B completions: -A / L on each of a completion's L tokens, over B.
    scores, batch = same_advantage(*world())
    mask = np.asarray(batch.rollout.mask)
    batch = dataclasses.replace(
        batch,
        rollout=dataclasses.replace(batch.rollout, old_logprobs=scores.logprobs),
        weights=losses.sequence_mean()(batch.rollout.mask),
    )
    length, live = np.maximum(mask.sum(axis=1, keepdims=True), 1), mask.any(axis=1).sum()
    expected = np.where(mask, -np.asarray(batch.advantages) / length / live, 0)
    np.testing.assert_allclose(slope_of(objective, scores, batch), expected, rtol=1e-12, atol=1e-15)
