"""Each loss term and weighting against a NumPy loop, golden values, and its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads

from eqrl import _losses as losses
from eqrl._losses.base import term
from eqrl._types import Batch, Rollout, Scores


TERMS = [
    ("clipped", {}),
    ("clipped", {"low": 0.1, "high": 0.3}),
    ("clipped", {"dual": 1.05}),
    ("reinforce", {}),
    ("kl", {}),
    ("kl", {"estimator": "k1"}),
    ("kl", {"estimator": "k2"}),
    ("entropy_bonus", {}),
    ("value_loss", {}),
    ("value_loss", {"clip": 0.05}),
    ("value_loss", {"clip": None}),
]
by_name = pytest.mark.parametrize("name, arguments", TERMS)


def loss_of(objective, scores, batch):
    return jnp.sum(batch.weights * objective(scores, batch)[0])


def masked_mean(x, batch):
    return np.asarray(x)[np.asarray(batch.rollout.mask)].mean()


def line(logratio, advantage, *, on_policy=False, **fields):
    """One row of tokens with given log-ratios and advantages, every token of weight 1."""
    logratio, advantage = jnp.asarray(logratio)[None], jnp.asarray(advantage)[None]
    zeros = jnp.zeros_like(logratio)
    rollout = Rollout(
        tokens=zeros.astype(jnp.int32),
        mask=jnp.ones(zeros.shape, bool),
        positions=zeros.astype(jnp.int32),
        logprobs=zeros,
        group=jnp.zeros(1, jnp.int32),
        truncated=jnp.zeros(1, bool),
        old_logprobs=None if on_policy else zeros,
        ref_logprobs=zeros,
        values=fields.get("old_values"),
    )
    batch = Batch(rollout, advantage, zeros + 1, zeros + 1 / zeros.size, fields.get("targets"))
    return Scores(logratio, zeros, fields.get("values")), batch


# --- values ---------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(name, arguments, seed, x64):
    scores, batch = oracles.loss_world(seed)
    value, metrics = getattr(losses, name)(**arguments)(scores, batch)
    expected = getattr(oracles, name)(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    parts = [k for k in metrics if k.startswith("loss/")]
    assert len(parts) == 1
    total = np.sum(np.asarray(batch.weights) * expected)
    np.testing.assert_allclose(metrics[parts[0]], total, rtol=1e-12)


def test_clip_fractions_are_token_means(x64):
    scores, batch = oracles.loss_world(3)
    ratio = np.exp(scores.logprobs - batch.rollout.need("old_logprobs"))
    a = np.asarray(batch.advantages)
    _, metrics = losses.clipped(0.1, 0.3, dual=1.2)(scores, batch)
    expected = {
        "policy/clip_low_frac": (ratio < 0.9) & (a < 0),
        "policy/clip_high_frac": (ratio > 1.3) & (a > 0),
        "policy/dual_clip_frac": (ratio > 1.2) & (a < 0),
    }
    for name, hit in expected.items():
        share = masked_mean(hit, batch)
        assert share > 0
        np.testing.assert_allclose(metrics[name], share, rtol=1e-12)


def test_value_clip_fraction_and_reference_kl_are_token_means(x64):
    scores, batch = oracles.loss_world(3)
    _, metrics = losses.value_loss(0.1)(scores, batch)
    worse = oracles.value_loss(scores, batch, 0.1) > oracles.value_loss(scores, batch, None)
    assert 0 < masked_mean(worse, batch) < 1
    np.testing.assert_allclose(metrics["value/clip_frac"], masked_mean(worse, batch), rtol=1e-12)
    _, metrics = losses.kl("k2")(scores, batch)
    k3 = masked_mean(oracles.kl(scores, batch, "k3"), batch)
    np.testing.assert_allclose(metrics["ref/kl_k3"], k3, rtol=1e-12)


# --- golden values of reference/algorithms.md, Appendix A -----------------------------------------

# ratio, A, PPO (0.2, 0.28), with dual 3, gradients of both wrt the log-prob
GRID = [
    (0.10, 1, -0.1000, -0.1000, -0.1000, -0.1000),
    (0.10, -1, 0.8000, 0.8000, 0.0000, 0.0000),
    (0.70, 1, -0.7000, -0.7000, -0.7000, -0.7000),
    (0.70, -1, 0.8000, 0.8000, 0.0000, 0.0000),
    (0.90, 1, -0.9000, -0.9000, -0.9000, -0.9000),
    (0.90, -1, 0.9000, 0.9000, 0.9000, 0.9000),
    (1.00, 1, -1.0000, -1.0000, -1.0000, -1.0000),
    (1.00, -1, 1.0000, 1.0000, 1.0000, 1.0000),
    (1.25, 1, -1.2500, -1.2500, -1.2500, -1.2500),
    (1.25, -1, 1.2500, 1.2500, 1.2500, 1.2500),
    (1.40, 1, -1.2800, -1.2800, 0.0000, 0.0000),
    (1.40, -1, 1.4000, 1.4000, 1.4000, 1.4000),
    (4.00, 1, -1.2800, -1.2800, 0.0000, 0.0000),
    (4.00, -1, 4.0000, 3.0000, 4.0000, 0.0000),
]


@pytest.mark.parametrize("dual", [None, 3.0])
def test_golden_surrogate(dual, x64):
    ratio, a, ppo, capped, ppo_slope, capped_slope = np.array(GRID).T
    scores, batch = line(np.log(ratio), a)
    objective = losses.clipped(0.2, 0.28, dual=dual)
    value, _ = objective(scores, batch)
    slope = jax.grad(loss_of, 1)(objective, scores, batch).logprobs
    np.testing.assert_allclose(value[0], ppo if dual is None else capped, atol=1e-12)
    np.testing.assert_allclose(slope[0], ppo_slope if dual is None else capped_slope, atol=1e-12)


def test_dual_clip_is_trls_delta(x64):
    rng = np.random.default_rng(0)
    ratio, a = np.exp(rng.standard_normal(200)), rng.standard_normal(200)
    value, _ = losses.clipped(0.2, 0.28, dual=2.0)(*line(np.log(ratio), a))
    delta = -np.minimum(a * np.minimum(ratio, 2.0), a * np.clip(ratio, 0.8, 1.28))
    np.testing.assert_allclose(value[0], delta, rtol=1e-12)


@pytest.mark.parametrize(
    "estimator, value, slope",
    [
        ("k1", [0.5, -0.5, 0, 3, -3], [1, 1, 1, 1, 1]),
        ("k2", [0.125, 0.125, 0, 4.5, 4.5], [0.5, -0.5, 0, 3, -3]),
        (
            "k3",
            [0.106531, 0.148721, 0, 2.049787, 16.085537],
            [0.393469, -0.648721, 0, 0.950213, -19.085537],
        ),
    ],
)
def test_golden_kl(estimator, value, slope, x64):
    scores, batch = line([0.5, -0.5, 0.0, 3.0, -3.0], np.zeros(5))
    objective = losses.kl(estimator)
    np.testing.assert_allclose(objective(scores, batch)[0][0], value, atol=1e-6)
    gradient = jax.grad(loss_of, 1)(objective, scores, batch).logprobs[0]
    np.testing.assert_allclose(gradient, slope, atol=1e-6)


def test_golden_value_loss(x64):
    fields = {"values": [0.9, 0.1], "old_values": [0.2, 0.2], "targets": [1.0, 1.0]}
    fields = {name: jnp.asarray([x]) for name, x in fields.items()}
    scores, batch = line([0.0, 0.0], [0.0, 0.0], **fields)
    value, _ = losses.value_loss(0.5)(scores, batch)
    np.testing.assert_allclose(value[0], [0.045, 0.405], atol=1e-12)


@pytest.mark.parametrize(
    "weighting, expected",
    [
        (losses.token_mean(), 3.6666666666666665),
        (losses.sequence_sum(), 11.0),
        (losses.sequence_mean(), 4.25),
        # algorithms.md prints 22 / (3 rows * 8); the empty row is no row here: 22 / (2 * 8).
        (losses.constant_length(8), 1.375),
        (losses.constant_length(4), 2.75),
    ],
    ids=repr,
)
def test_golden_weightings(weighting, expected, x64):
    loss = jnp.array([[1.0, 2, 3, 4], [5, 7, 0, 0], [9, 9, 9, 9]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(jnp.sum(weighting(mask) * loss), expected, rtol=1e-14)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("token_mean", {}),
        ("sequence_mean", {}),
        ("sequence_sum", {}),
        ("constant_length", {"length": 6}),
    ],
)
def test_weighting_equals_the_loop(name, arguments, x64):
    _, rollout = oracles.world()
    weights = getattr(losses, name)(**arguments)(rollout.mask)
    expected = getattr(oracles, name)(rollout.mask, **arguments)
    np.testing.assert_allclose(weights, expected, rtol=1e-14)


# --- gradients ------------------------------------------------------------------------------------


# Not reinforce: its value is -A everywhere; its gradient has tests of its own.
@pytest.mark.parametrize("name, arguments", [row for row in TERMS if row[0] != "reinforce"])
def test_gradient_equals_finite_differences(name, arguments, x64):
    scores, batch = oracles.loss_world()
    objective = getattr(losses, name)(**arguments)
    function = jax.jit(lambda scores: loss_of(objective, scores, batch))
    check_grads(function, (scores,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


@pytest.mark.parametrize(
    "objective",
    [losses.clipped(), losses.clipped(0, 0), losses.clipped(dual=3.0), losses.reinforce()],
    ids=repr,
)
@pytest.mark.parametrize("stored", [True, False])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(objective, stored, x64):
    scores, batch = oracles.loss_world()
    old = scores.logprobs if stored else None
    rollout = dataclasses.replace(batch.rollout, old_logprobs=old)
    batch = dataclasses.replace(batch, rollout=rollout)
    gradient = jax.grad(loss_of, 1)(objective, scores, batch)
    mask = np.asarray(rollout.mask)
    expected = np.where(mask, -np.asarray(batch.advantages * batch.weights), 0)
    np.testing.assert_allclose(gradient.logprobs, expected, rtol=1e-12, atol=1e-15)
    value, _ = objective(scores, batch)
    np.testing.assert_allclose(value, np.where(mask, -batch.advantages, 0), rtol=1e-12)


def test_reinforce_ignores_old_logprobs(x64):
    scores, batch = oracles.loss_world()
    gradient = jax.grad(loss_of, 1)(losses.reinforce(), scores, batch).logprobs
    expected = np.where(batch.rollout.mask, -batch.advantages * batch.weights, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", [losses.clipped(), losses.unclipped()], ids=repr)
def test_a_token_without_advantage_gives_nothing_however_far_it_moved(objective):
    scores, batch = line(np.array([200, -200, 0.1], "f"), np.array([0, 0, 1], "f"))
    value = objective(scores, batch)[0]
    gradient = jax.grad(loss_of, argnums=1)(objective, scores, batch).logprobs
    np.testing.assert_array_equal(value[0, :2], [0.0, 0.0])
    np.testing.assert_array_equal(gradient[0, :2], [0.0, 0.0])
    np.testing.assert_allclose(gradient[0, 2], -np.exp(0.1), rtol=1e-6)


def test_no_overflow_reaches_the_gradient():
    # exp(200) is infinite in float32; a clipped token must still have gradient 0, not 0 * inf.
    scores, batch = line(np.array([200, -200, 200], "f"), np.array([1, -1, -1], "f"))
    objective = losses.clipped(dual=3.0)
    value, _ = objective(scores, batch)
    np.testing.assert_allclose(value[0], [-1.2, 0.8, 3.0], rtol=1e-6)
    gradient = jax.grad(loss_of, 1)(objective, scores, batch).logprobs
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))


def test_entropy_bonus_raises_entropy(x64):
    scores, batch = oracles.loss_world()
    gradient = jax.grad(loss_of, 1)(0.01 * losses.entropy_bonus(), scores, batch).entropy
    np.testing.assert_allclose(gradient, -0.01 * batch.weights, rtol=1e-12, atol=1e-15)


def test_value_clip_fraction_counts_no_rounding():
    # On the first minibatch predictions are the old ones; nothing is clipped, in float32 either.
    scores, batch = oracles.loss_world(dtype=jnp.float32)
    batch = dataclasses.replace(
        batch, rollout=dataclasses.replace(batch.rollout, values=scores.values)
    )
    assert float(losses.value_loss()(scores, batch)[1]["value/clip_frac"]) == 0


def test_value_loss_pulls_towards_the_target_inside_the_clip(x64):
    scores, batch = oracles.loss_world()
    rollout = dataclasses.replace(batch.rollout, values=scores.values)
    batch = dataclasses.replace(batch, rollout=rollout)
    gradient = jax.grad(loss_of, 1)(losses.value_loss(), scores, batch).values
    error = jax.tree.map(jnp.subtract, scores.values, batch.targets)
    expected = np.where(rollout.mask, error * batch.weights, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_k3_is_never_negative(x64):
    d = np.random.default_rng(0).standard_normal(1000) * 3
    value, _ = losses.kl()(*line(d, 0 * d))
    assert np.all(np.asarray(value) > 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator, x64):
    # Exactly: their mean under the policy is the KL divergence.
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    value, _ = losses.kl(estimator)(*line(np.log(p / q), np.zeros(6)))
    np.testing.assert_allclose(np.dot(p, value[0]), np.dot(p, np.log(p / q)), rtol=1e-12)


# --- composition and refusals ---------------------------------------------------------------------


def test_terms_add_and_scale(x64):
    scores, batch = oracles.loss_world()
    objective = losses.clipped() + 0.04 * losses.kl() + losses.value_loss() * 0.5
    value, metrics = objective(scores, batch)
    expected = (
        oracles.clipped(scores, batch)
        + 0.04 * oracles.kl(scores, batch)
        + 0.5 * oracles.value_loss(scores, batch)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    # Parts of the loss are logged before their coefficient.
    unscaled = np.sum(np.asarray(batch.weights) * oracles.kl(scores, batch))
    np.testing.assert_allclose(metrics["loss/kl"], unscaled, rtol=1e-12)
    assert objective.requires == {"ref_logprobs", "values"}


def test_parts_of_one_name_add_up(x64):
    scores, batch = oracles.loss_world()
    first, second = losses.clipped(0.1, 0.1), losses.clipped(0.3, 0.3)
    _, both = (first + second)(scores, batch)
    apart = [one(scores, batch)[1] for one in (first, second)]
    total = apart[0]["loss/policy"] + apart[1]["loss/policy"]
    np.testing.assert_allclose(both["loss/policy"], total, rtol=1e-12)
    assert both["policy/clip_low_frac"] == apart[0]["policy/clip_low_frac"]


def squared(scores, batch, *, power):
    value = scores.logprobs**power
    return value, {"loss/squared": jnp.sum(value)}


def test_a_users_term_is_lifted_by_one_call():
    scores, batch = oracles.loss_world()
    mine = term(squared, power=2, requires=("version",))
    assert repr(losses.clipped() + 0.1 * mine) == "clipped() + 0.1 * squared(power=2)"
    assert (losses.kl() + mine).requires == {"version", "ref_logprobs"}
    value, _ = mine(scores, batch)
    assert np.all(np.asarray(value)[~np.asarray(batch.rollout.mask)] == 0)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: losses.clipped(-0.1), "low=-0.1"),
        (lambda: losses.clipped(1.5), "low=1.5"),
        (lambda: losses.clipped(0.2, -1), "high=-1"),
        (lambda: losses.clipped(dual=1.0), "dual=1.0"),
        (lambda: losses.kl("k0"), "estimator='k0'"),
        (lambda: losses.value_loss(0), "clip=0"),
        (lambda: losses.constant_length(0), "length=0"),
    ],
)
def test_impossible_hyperparameters_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} .*; pass "):
        build()


def test_what_a_term_lacks_is_named():
    scores, batch = oracles.loss_world()
    bare = dataclasses.replace(batch.rollout, ref_logprobs=None)
    with pytest.raises(ValueError, match=r"rollout\.ref_logprobs"):
        losses.kl()(scores, dataclasses.replace(batch, rollout=bare))
    with pytest.raises(ValueError, match=r"scores\.values"):
        losses.value_loss()(dataclasses.replace(scores, values=None), batch)
    with pytest.raises(ValueError, match=r"batch\.targets"):
        losses.value_loss()(scores, dataclasses.replace(batch, targets=None))
