"""KL terms and the Huber value loss: loops, closed forms, and exact sums over five outcomes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_factors
import pytest
from helpers import label
from oracles_factors import line, token_mean_of

from eqrl import _losses as losses
from eqrl._types import Scores


KL_CASES = [
    {"gradient": "k2"},
    {"estimator": "k1", "gradient": "k3"},
    {"limit": 0.1},
    {"estimator": "k1", "limit": 0.1},
    {"input_limit": 0.2},
    {"limit": 0.1, "input_limit": 0.5, "gradient": "k2"},
    *({"estimator": estimator, "unbiased": True} for estimator in ("k1", "k2", "k3")),
    {"limit": 0.1, "unbiased": True},
]


# --- KL and value loss ----------------------------------------------------------------------------


def loss_of(term, scores, batch) -> jnp.ndarray:
    return jnp.sum(batch.weights * term(scores, batch)[0])


@pytest.mark.parametrize("arguments", KL_CASES, ids=repr)
@pytest.mark.parametrize("seed", [1, 2])
def test_kl_equals_the_loop(arguments, seed, x64):
    scores, batch = oracles.loss_world(seed)
    value, metrics = losses.kl(**arguments)(scores, batch)
    expected = oracles_factors.kl(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    k3 = token_mean_of(oracles.kl(scores, batch), batch)
    np.testing.assert_allclose(metrics["ref/kl_k3"], k3, rtol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("huber", [0.3, 1.0])
def test_huber_equals_the_loop(clip, huber, x64):
    scores, batch = oracles.loss_world(1)
    term = losses.value_loss(clip, huber=huber)
    value, metrics = term(scores, batch)
    expected = oracles_factors.value_loss(scores, batch, clip, huber)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    assert not np.allclose(expected, oracles_factors.value_loss(scores, batch, clip))
    worse = expected > oracles_factors.value_loss(scores, batch, None, huber)
    np.testing.assert_allclose(metrics["value/clip_frac"], token_mean_of(worse, batch), rtol=1e-12)
    wide = losses.value_loss(clip, huber=1e6)(scores, batch)[0]
    np.testing.assert_allclose(wide, losses.value_loss(clip)(scores, batch)[0], rtol=1e-12)


def test_huber_bounds_the_gradient(x64):
    scores, batch = oracles.loss_world(1)
    slope = jax.grad(loss_of, 1)(losses.value_loss(None, huber=0.3), scores, batch).values
    error = np.asarray(scores.values) - np.asarray(batch.targets)
    error = error * np.asarray(batch.rollout.mask)
    np.testing.assert_allclose(slope, batch.weights * np.clip(error, -0.3, 0.3), atol=1e-12)


SLOPES = [  # arguments and d value / d logp at d and log-ratio r
    ({"gradient": "k2"}, lambda d, r: d),
    ({"estimator": "k2", "gradient": "k1"}, lambda d, r: np.ones_like(d)),
    ({"limit": 0.1}, lambda d, r: (1 - np.exp(-d)) * (np.exp(-d) + d - 1 < 0.1)),
    ({"input_limit": 0.2}, lambda d, r: (1 - np.exp(-d)) * (np.abs(d) < 0.2)),
    # Clamps leave a borrowed gradient alone.
    ({"limit": 0.1, "input_limit": 0.2, "gradient": "k2"}, lambda d, r: d),
    ({"unbiased": True}, lambda d, r: np.exp(r) * d),
    ({"estimator": "k1", "unbiased": True}, lambda d, r: np.exp(r) * (d + 1)),
]


@pytest.mark.parametrize("arguments, slope", SLOPES, ids=label)
def test_kl_gradient_in_closed_form(arguments, slope, x64):
    scores, batch = oracles.loss_world(1)
    found = jax.grad(loss_of, 1)(losses.kl(**arguments), scores, batch).logprobs
    d = np.asarray(scores.logprobs - batch.rollout.need("ref_logprobs"))
    r = np.asarray(scores.logprobs) - oracles_factors.old_of(scores, batch)
    expected = np.where(batch.rollout.mask, batch.weights * slope(d, r), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


LOGITS = np.array([0.3, -1.2, 0.8, 0.1, -0.4])
REFERENCE = np.array([-0.2, 0.5, 0.9, -1.0, 0.2])
SAMPLER = np.array([0.1, -0.6, 0.2, 0.9, 0.0])


def expectation(logits, arguments, *, sampler=None):
    """A KL term's expectation over five outcomes, each weighed by its probability (stopped)."""
    logp = jax.nn.log_softmax(logits)
    drawn = logp if sampler is None else jax.nn.log_softmax(jnp.asarray(sampler))
    drawn = jax.lax.stop_gradient(drawn)
    scores, batch = line(np.zeros(5), rows=5)
    rollout = dataclasses.replace(
        batch.rollout,
        old_logprobs=None if sampler is None else drawn[:, None],
        ref_logprobs=jax.nn.log_softmax(jnp.asarray(REFERENCE))[:, None],
    )
    batch = dataclasses.replace(batch, rollout=rollout, weights=jnp.exp(drawn)[:, None])
    return loss_of(losses.kl(**arguments), Scores(logp[:, None], scores.entropy), batch)


def exact(logits, *, forward=False):
    """KL(pi || reference) by summation; `forward`: KL(reference || pi)."""
    logp, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(jnp.asarray(REFERENCE))
    return (
        jnp.sum(jnp.exp(ref) * (ref - logp)) if forward else jnp.sum(jnp.exp(logp) * (logp - ref))
    )


@pytest.mark.parametrize(
    "arguments, same_value, gradient",
    [
        ({"estimator": "k1"}, True, "none"),
        ({"estimator": "k2"}, False, "exact"),
        ({"estimator": "k3"}, True, "forward"),
        ({"estimator": "k3", "gradient": "k2"}, True, "exact"),
        ({"estimator": "k1", "gradient": "k2"}, True, "exact"),
        ({"estimator": "k1", "unbiased": True}, True, "exact"),
        ({"estimator": "k3", "unbiased": True}, True, "exact"),
        ({"estimator": "k2", "unbiased": True}, False, "neither"),
    ],
)
def test_expected_gradients_of_kl_on_policy(arguments, same_value, gradient, x64):
    logits = jnp.asarray(LOGITS)
    value, slope = jax.value_and_grad(expectation)(logits, arguments)
    truth, exact_slope = jax.value_and_grad(exact)(logits)
    forward = jax.grad(lambda x: exact(x, forward=True))(logits)
    known = {"none": jnp.zeros(5), "exact": exact_slope, "forward": forward}
    assert np.isclose(value, truth, rtol=1e-12) == same_value
    for name, expected in known.items():
        if name == gradient:
            np.testing.assert_allclose(slope, expected, rtol=1e-11, atol=1e-13)
        else:
            assert not np.allclose(slope, expected, atol=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_corrects_for_the_sampler(estimator, x64):
    logits = jnp.asarray(LOGITS)
    arguments = {"estimator": estimator, "unbiased": True}
    value, slope = jax.value_and_grad(lambda x: expectation(x, arguments, sampler=SAMPLER))(logits)
    truth, exact_slope = jax.value_and_grad(exact)(logits)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    np.testing.assert_allclose(slope, exact_slope, rtol=1e-11, atol=1e-13)
    plain = expectation(logits, {"estimator": estimator}, sampler=SAMPLER)
    assert not np.isclose(plain, truth, rtol=0.05)


def test_importance_weights_correct_the_policy_gradient(x64):
    # On five outcomes: untruncated weights give the trainer's expectation from the sampler's draws.
    logits, reward = jnp.asarray(LOGITS), jnp.asarray([1.0, -2.0, 0.5, 3.0, 0.0])
    truth = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * reward))(logits)
    drawn = jax.nn.log_softmax(jnp.asarray(SAMPLER))

    def loss(logits, piece):
        logp = jax.nn.log_softmax(logits)
        scores, batch = line(np.zeros(5), rows=5, advantages=reward)
        rollout = dataclasses.replace(
            batch.rollout,
            logprobs=drawn[:, None],
            old_logprobs=jax.lax.stop_gradient(logp)[:, None],
        )
        batch = dataclasses.replace(batch, rollout=rollout, weights=jnp.exp(drawn)[:, None])
        return loss_of(piece * losses.reinforce(), Scores(logp[:, None], scores.entropy), batch)

    for piece in (losses.tis(1e3), losses.tis_sequence(1e3)):
        np.testing.assert_allclose(jax.grad(loss)(logits, piece), truth, rtol=1e-11, atol=1e-13)
    assert not np.allclose(jax.grad(loss)(logits, losses.tis(0.9)), truth, atol=1e-2)
