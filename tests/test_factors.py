"""Each factor against a NumPy loop, golden values, identities, edges, and composition."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_factors
import pytest
from oracles_factors import line, token_mean_of
from test_contract_factors import measured, prepared

from eqrl import _losses as losses
from eqrl._losses.factor import Constant, Kept, Product, as_factor, factor
from eqrl._select import drop_truncated
from eqrl._types import Scores


CASES = [
    ("tis", {}),
    ("tis", {"cap": 1.05}),
    ("tis_sequence", {}),
    ("tis_sequence", {"cap": 0.95}),
    ("clamp_weights", {}),
    ("clamp_weights", {"low": 0.95, "high": 1.05}),
    ("icepop", {}),
    ("icepop", {"low": 0.95, "high": 1.05}),
    ("sequence_mask", {}),
    ("sequence_mask", {"cap": 1.0}),
    ("sequence_mask", {"cap": 1.0, "weight": "token"}),
    ("geometric_mask", {}),
    ("geometric_mask", {"low": 0.95, "high": 1.05}),
    *(
        ("kl_mask", {"threshold": threshold, "estimator": estimator, "reduce": reduce})
        for estimator in ("k1", "k2", "k3")
        for reduce, threshold in (
            (("mean", 0.02), ("sum", 0.06), ("max", 0.15))
            if estimator == "k1"
            else (("mean", 0.004), ("sum", 0.02), ("max", 0.0125))
        )
    ),
    ("binary_kl_mask", {}),
    ("binary_kl_mask", {"threshold": 0.003}),
    ("top_entropy", {}),
    ("top_entropy", {"share": 0.55}),
    ("m2po", {}),
    ("m2po", {"budget": 0.001}),
    ("m2po", {"budget": 0.001, "everywhere": True}),
    ("m2po", {"budget": 0.0, "everywhere": True}),
    ("opsm", {"delta": 0.05}),
    ("opsm", {"delta": 0.05, "against": "old"}),
    ("adaptive_entropy", {"target": 0.2, "start": 0.5}),
    ("adaptive_entropy", {"target": 0.9, "start": 0.5}),
]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments", CASES)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(name, arguments, seed, x64):
    scores, batch = oracles.loss_world(seed)
    value, _ = measured(getattr(losses, name)(**arguments), scores, batch)
    expected = getattr(oracles_factors, name)(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, arguments", [case for case in CASES if case[1]])
def test_cases_touch_some_tokens_and_spare_others(name, arguments, x64):
    bounds = [x for x in arguments.values() if name in ("tis", "tis_sequence", "clamp_weights")]
    touched = []
    for seed in (1, 2):
        scores, batch = oracles.loss_world(seed)
        value = getattr(oracles_factors, name)(scores, batch, **arguments)
        touched.extend(np.isin(value, [0, *bounds])[np.asarray(batch.rollout.mask)])
    # An adaptive coefficient is on or off for all, and no token of these worlds agrees exactly.
    uniform = name == "adaptive_entropy" or arguments.get("budget") == 0
    assert 0 < np.mean(touched) < 1 or uniform


@pytest.mark.parametrize("name", ["tis", "icepop", "sequence_mask", "opsm"])
def test_single_update_takes_the_current_policy(name, x64):
    scores, batch = oracles.loss_world(1)
    rollout = dataclasses.replace(batch.rollout, old_logprobs=None)
    batch = dataclasses.replace(batch, rollout=rollout)
    arguments = {"delta": 0.01, "against": "old"} if name == "opsm" else {}
    value, _ = getattr(losses, name)(**arguments)(scores, batch)
    expected = getattr(oracles_factors, name)(scores, batch, **arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    if name == "opsm":  # compared with itself
        np.testing.assert_array_equal(value, np.asarray(rollout.mask, float))


def test_metrics_are_token_means(x64):
    scores, batch = oracles.loss_world(1)
    weight = np.exp(oracles_factors.old_of(scores, batch) - batch.rollout.logprobs)
    for piece, hit in (
        (losses.tis(1.05), weight > 1.05),
        (losses.clamp_weights(0.95, 1.05), (weight > 1.05) | (weight < 0.95)),
    ):
        value, metrics = piece(scores, batch)
        assert metrics.keys() == {"mismatch/truncated_frac", "mismatch/correction_mean"}
        share = token_mean_of(hit, batch)
        assert 0 < share < 1
        np.testing.assert_allclose(metrics["mismatch/truncated_frac"], share)
        mean = token_mean_of(value, batch)
        np.testing.assert_allclose(metrics["mismatch/correction_mean"], mean)
    for piece in (losses.icepop(0.95, 1.05), losses.kl_mask(0.004), losses.binary_kl_mask(0.003)):
        value, metrics = piece(scores, batch)
        assert metrics.keys() == {"mismatch/masked_frac", "mismatch/correction_mean"}
        share = token_mean_of(np.asarray(value) == 0, batch)
        assert 0 < share < 1
        np.testing.assert_allclose(metrics["mismatch/masked_frac"], share)
        np.testing.assert_allclose(metrics["mismatch/correction_mean"], token_mean_of(value, batch))
    for piece, name, masked in (
        (losses.opsm(0.05), "policy/opsm_masked_frac", True),
        (losses.m2po(0.001), "policy/m2po_masked_frac", True),
        (losses.top_entropy(0.4), "policy/top_entropy_frac", False),
    ):
        value, metrics = measured(piece, scores, batch)
        share = token_mean_of(np.asarray(value) == (0 if masked else 1), batch)
        assert metrics.keys() == {name} and 0 < share < 1
        np.testing.assert_allclose(metrics[name], share)


# --- golden values of reference/algorithms.md, Appendix A -----------------------------------------

GAPS = [0.01, -0.02, 0.8, -1.2, 1.7]
W = [1.01005, 0.980199, 2.225541, 0.301194, 5.473947]
PRODUCT, MEAN = 3.632787, 1.294339


@pytest.mark.parametrize(
    "piece, expected",
    [
        (losses.tis(100.0), W),
        (losses.tis(), [1.01005, 0.980199, 2.0, 0.301194, 2.0]),
        (losses.clamp_weights(), [1.01005, 0.980199, 2.225541, 0.5, 5.0]),
        (losses.icepop(), [1.01005, 0.980199, 2.225541, 0.0, 0.0]),
        (losses.tis_sequence(), [2.0] * 5),
        (losses.tis_sequence(10), [PRODUCT] * 5),
        (losses.sequence_mask(), [0.0] * 5),
        (losses.sequence_mask(4), [PRODUCT] * 5),
        (losses.sequence_mask(4, weight="token"), W),
        (losses.geometric_mask(), [0.0] * 5),
        (losses.geometric_mask(MEAN - 1e-6, MEAN + 1e-6), W),
        (losses.geometric_mask(MEAN + 1e-6, 2), [0.0] * 5),
        (losses.geometric_mask(0, MEAN - 1e-6), [0.0] * 5),
    ],
    ids=repr,
)
def test_golden_weights(piece, expected, x64):
    value, _ = piece(*line(GAPS))
    np.testing.assert_allclose(value[0], expected, atol=6e-7)


# --- identities and edges -------------------------------------------------------------------------

IDENTITIES = [
    losses.tis(),
    losses.tis(1),
    losses.tis_sequence(),
    losses.clamp_weights(),
    losses.icepop(),
    losses.sequence_mask(),
    losses.sequence_mask(weight="token"),
    losses.geometric_mask(),
    losses.kl_mask(0.0),
    losses.kl_mask(0.0, estimator="k1", reduce="max"),
    losses.binary_kl_mask(0.0),
    losses.m2po(0.0),
    losses.m2po(0.0, everywhere=True),
    losses.opsm(0.0, against="old"),
    losses.top_entropy(1.0),
    losses.normalised(losses.tis()),
    losses.normalised(losses.icepop()),
    # Bounds belong to what is kept.
    losses.icepop(1.0, 1.0),
    losses.sequence_mask(1.0),
    losses.geometric_mask(1.0, 1.0),
]


@pytest.mark.parametrize("piece", IDENTITIES, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_identity_where_sampler_and_trainer_agree(piece, dtype, x64):
    _, batch = oracles.loss_world(dtype=jnp.dtype(dtype))
    rollout = dataclasses.replace(batch.rollout, old_logprobs=batch.rollout.logprobs)
    scores = Scores(rollout.logprobs, jnp.zeros_like(rollout.logprobs))
    value, _ = measured(piece, scores, dataclasses.replace(batch, rollout=rollout))
    expected = np.asarray(rollout.mask, dtype)
    if isinstance(piece, type(losses.normalised(losses.tis()))):  # a quotient of two sums
        np.testing.assert_allclose(value, expected, rtol=1e-6 if dtype == "float32" else 1e-12)
    else:
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    "piece, expected",
    [
        (losses.tis(), [2.0, 0.0]),
        (losses.tis_sequence(), [2.0, 0.0]),
        (losses.clamp_weights(), [5.0, 0.5]),
        (losses.icepop(), [0.0, 0.0]),
        (losses.sequence_mask(), [0.0, 0.0]),
        (losses.geometric_mask(), [0.0, 0.0]),
        (losses.kl_mask(1.0), [0.0, 0.0]),
        (losses.kl_mask(1.0, estimator="k1"), [1.0, 0.0]),
        (losses.m2po(everywhere=True), [0.0, 0.0]),
        (losses.binary_kl_mask(), [0.0, 1.0]),
    ],
    ids=repr,
)
def test_overflow_stays_finite(piece, expected):
    # One token too likely by 200 nats and one too unlikely: their weights are infinite and 0.
    scores, batch = line([200.0, -200.0], rows=2)
    rollout = dataclasses.replace(
        batch.rollout,
        logprobs=jnp.asarray([[-200.0], [-3.0]]),
        old_logprobs=jnp.asarray([[0.0], [-203.0]]),
    )
    batch = dataclasses.replace(batch, rollout=rollout)
    scores = Scores(rollout.need("old_logprobs"), scores.entropy)

    def total(scores):
        term = piece * losses.reinforce()
        return jnp.sum(term(scores, prepared(term, batch))[0])

    value, metrics = measured(piece, scores, batch)
    np.testing.assert_allclose(value[:, 0], expected, atol=1e-30)
    for x in jax.tree.leaves((metrics, jax.grad(total)(scores))):
        assert np.all(np.isfinite(x))


def test_bounds_are_kept(x64):
    gap = np.log([0.5, 5.0, 0.5 * (1 - 1e-9), 5.0 * (1 + 1e-9)])
    value, _ = losses.icepop(0.5 * (1 - 1e-12), 5.0 * (1 + 1e-12))(*line(gap))
    np.testing.assert_allclose(value[0], [0.5, 5.0, 0.0, 0.0])


def test_binary_kl_is_bounded_in_both_directions(x64):
    # D(1/2 || 1/100) = 1.614 and D(1/100 || 1/2) = 0.637, whoever says which.
    one, other = np.log([[0.5, 0.01]]), np.log([[0.01, 0.5]])
    scores, batch = line([0.0, 0.0])
    rollout = dataclasses.replace(
        batch.rollout, logprobs=jnp.asarray(one), old_logprobs=jnp.asarray(other)
    )
    batch = dataclasses.replace(batch, rollout=rollout)
    for threshold, expected in ((1.62, 1), (1.61, 0), (0.6, 0)):
        value, _ = losses.binary_kl_mask(threshold)(scores, batch)
        np.testing.assert_array_equal(value, np.full((1, 2), expected))


def test_kl_mask_has_the_signs_of_the_sampler(x64):
    # The trainer finds the tokens likelier than the sampler did: k1 of KL(sampler || old) < 0.
    likely, unlikely = line([0.3, 0.3]), line([-0.3, -0.3])
    piece = losses.kl_mask(0.0, estimator="k1")
    assert np.all(np.asarray(piece(*likely)[0]) == 1)
    assert np.all(np.asarray(piece(*unlikely)[0]) == 0)
    between = (np.exp(0.3) - 1.3 + np.exp(-0.3) - 0.7) / 2
    assert np.all(np.asarray(losses.kl_mask(between)(*likely)[0]) == 0)
    assert np.all(np.asarray(losses.kl_mask(between)(*unlikely)[0]) == 1)


# --- composition ----------------------------------------------------------------------------------


def test_factors_multiply_and_weigh(x64):
    scores, batch = oracles.loss_world(1)
    term = losses.tis(1.05) * (0.5 * losses.opsm(0.05)) * losses.clipped()
    assert repr(term) == "tis(cap=1.05) * (0.5 * opsm(0.05)) * clipped()"
    value, metrics = term(scores, prepared(term, batch))
    expected = (
        0.5
        * oracles_factors.tis(scores, batch, 1.05)
        * oracles_factors.opsm(scores, batch, 0.05)
        * oracles.clipped(scores, batch)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
    assert {"loss/policy", "policy/opsm_masked_frac", "mismatch/truncated_frac"} < metrics.keys()


def test_what_is_a_factor():
    assert isinstance(as_factor(2), Constant) and isinstance(as_factor(jnp.ones(())), Constant)
    assert isinstance(as_factor(drop_truncated()), Kept)
    assert isinstance(losses.tis() * drop_truncated(), Product)
    assert isinstance(drop_truncated() * losses.tis(), Product)
    others: list[Any] = ["tis", None, [1.0], losses.token_mean()]
    for wrong in others:
        assert as_factor(wrong) is None
        with pytest.raises(TypeError):
            operator.mul(losses.tis(), wrong)


def halve(scores, batch, *, by):
    return jnp.where(batch.rollout.mask, 1 / by, 0.0), {}


def test_a_users_factor_is_lifted_by_one_call():
    mine = factor(halve, by=2.0)
    scores, batch = oracles.loss_world()
    value, _ = (mine * losses.reinforce())(scores, batch)
    mask, advantages = np.asarray(batch.rollout.mask), np.asarray(batch.advantages)
    np.testing.assert_allclose(value, -0.5 * advantages * mask, rtol=1e-6)
    assert repr(mine) == "halve(by=2.0)"


def likely(scores, batch):
    return jnp.exp(jnp.where(batch.rollout.mask, scores.logprobs, 0.0)), {}


def test_no_gradient_flows_through_a_users_factor(x64):
    scores, batch = oracles.loss_world()
    term = factor(likely) * losses.reinforce()
    slope = jax.grad(lambda s: jnp.sum(term(s, batch)[0]))(scores).logprobs
    expected = -np.exp(scores.logprobs) * np.asarray(batch.advantages)
    np.testing.assert_allclose(slope, np.where(batch.rollout.mask, expected, 0), rtol=1e-12)


@pytest.mark.parametrize(
    "piece",
    [
        losses.top_entropy(),
        losses.m2po(),
        losses.adaptive_entropy(),
        losses.normalised(losses.tis()),
    ],
    ids=repr,
)
def test_an_unprepared_batch_is_refused(piece):
    with pytest.raises(ValueError, match="take the batch from `algorithm.assign`"):
        piece(*oracles.loss_world())


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: losses.tis(0), "cap=0"),
        (lambda: losses.tis_sequence(-1.0), "cap=-1.0"),
        (lambda: losses.clamp_weights(-0.1), "low=-0.1"),
        (lambda: losses.clamp_weights(2.0, 1.0), "high=1.0"),
        (lambda: losses.icepop(0.5, 0.4), "high=0.4"),
        (lambda: losses.geometric_mask(1.1, 1.0), "high=1.0"),
        (lambda: losses.sequence_mask(0.0), "cap=0.0"),
        (lambda: losses.sequence_mask(weight="row"), "weight='row'"),
        (lambda: losses.kl_mask(float("nan")), "threshold=nan"),
        (lambda: losses.kl_mask(1.0, estimator="k4"), "estimator='k4'"),
        (lambda: losses.kl_mask(1.0, reduce="median"), "reduce='median'"),
        (lambda: losses.binary_kl_mask(-1.0), "threshold=-1.0"),
        (lambda: losses.top_entropy(0.0), "share=0.0"),
        (lambda: losses.top_entropy(1.5), "share=1.5"),
        (lambda: losses.m2po(-0.1), "budget=-0.1"),
        (lambda: losses.opsm(-0.1), "delta=-0.1"),
        (lambda: losses.opsm(0.1, against="reference"), "against='reference'"),
        (lambda: losses.adaptive_entropy(step=-1.0), "step=-1.0"),
        (lambda: losses.adaptive_entropy(start=2.0), "start=2.0"),
        (lambda: losses.adaptive_entropy(least=0.5, most=0.1), "most=0.1"),
        (lambda: losses.kl(gradient="k4"), "gradient='k4'"),
        (lambda: losses.kl(limit=0), "limit=0"),
        (lambda: losses.kl(input_limit=-1), "input_limit=-1"),
        (lambda: losses.kl(gradient="k2", unbiased=True), "gradient='k2'"),
        (lambda: losses.value_loss(huber=0), "huber=0"),
    ],
)
def test_impossible_hyperparameters_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        build()
