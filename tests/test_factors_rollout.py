"""Factors whose statistics are those of the whole rollout, some carried from one to the next."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_factors
import pytest
from helpers import label
from oracles_factors import line
from test_contract_factors import measured

from eqrl import _advantages as signals, _losses as losses
from eqrl._select import drop_truncated
from eqrl._types import Scores
from eqrl.algorithms import Algorithm


# --- statistics of the rollout --------------------------------------------------------------------


SHARES = [(n, share) for n in (1, 2, 5, 11, 36) for share in (0.05, 0.2, 0.25, 0.75, 1.0)]


# In the last two the place (1 - share)(n - 1) is an integer, but comes out larger by rounding.
@pytest.mark.parametrize("tokens, share", [*SHARES, (76, 0.28), (151, 0.18)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_top_entropy_keeps_the_highest(tokens, share, dtype, x64):
    # Entropies 0..n-1: what stands at or above rank (1 - share)(n - 1) is kept.
    entropy = np.random.default_rng(0).permutation(tokens)
    scores, batch = line(np.zeros(tokens), entropy=entropy)
    batch = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch
    )
    value, _ = measured(losses.top_entropy(share), scores, batch)
    expected = entropy >= (1 - share) * (tokens - 1) - 1e-9
    np.testing.assert_array_equal(value[0], expected.astype(dtype))
    assert np.sum(value) >= 1


def test_top_entropy_keeps_ties(x64):
    value, _ = measured(losses.top_entropy(0.2), *line(np.zeros(6), entropy=[1, 3, 3, 2, 3, 0]))
    np.testing.assert_array_equal(value[0], [0, 1, 1, 0, 1, 0])


def test_m2po_masks_as_few_as_it_must(x64):
    gap = np.array([0.1, -0.1, 0.3, -0.4, 0.2])
    for budget, expected in (
        (0.07, [1, 1, 1, 1, 1]),
        (0.0621, [1, 1, 1, 1, 1]),
        (0.0619, [1, 1, 1, 0, 1]),
        (0.0376, [1, 1, 1, 0, 1]),
        (0.037, [1, 1, 0, 0, 1]),
        (0.0101, [1, 1, 0, 0, 0]),
        (0.0099, [0, 0, 0, 0, 0]),
    ):
        value, _ = measured(losses.m2po(budget, everywhere=True), *line(gap))
        np.testing.assert_array_equal(value[0], expected, err_msg=repr(budget))


def test_m2po_spares_what_a_clip_would_spare(x64):
    gap, advantage = np.array([1.0, 1.0, -1.0, -1.0, 1.0]), np.array([1, -1, 1, -1, 0])
    value, _ = measured(losses.m2po(), *line(gap, advantages=advantage))
    np.testing.assert_array_equal(value[0], [0, 1, 1, 0, 1])


def test_m2po_drops_ties_together_in_any_order(x64):
    gap = np.array([0.3, 0.3, 0.1, 0.3, 0.1])
    value, _ = measured(losses.m2po(0.05, everywhere=True), *line(gap))
    np.testing.assert_array_equal(value[0], [0, 0, 1, 0, 1])


def test_statistics_are_those_of_the_whole_rollout(x64):
    # Prepared in parts, other tokens would be kept; so the split test of the contract bites.
    scores, batch = oracles.loss_world(1)
    for piece in (losses.top_entropy(0.3), losses.m2po(0.004), losses.normalised(losses.tis())):
        whole, _ = measured(piece, scores, batch)
        half = jax.tree.map(lambda x: x[:4], (scores, batch))
        assert not np.allclose(measured(piece, *half)[0], whole[:4])


def test_opsm_reads_the_policy_in_training(x64):
    # Rows: failed and drifted, failed and near, won and drifted.
    scores, batch = line(np.zeros(6), rows=3, advantages=[-1, -1, -1, -1, 1, 1])
    moved = scores.logprobs - jnp.asarray([[0.5, 0.7], [0.5, 0.1], [0.9, 0.9]])
    value, metrics = losses.opsm(0.5)(Scores(moved, scores.entropy), batch)
    np.testing.assert_array_equal(value, [[0, 0], [1, 1], [1, 1]])
    np.testing.assert_allclose(metrics["policy/opsm_masked_frac"], 1 / 3)
    np.testing.assert_array_equal(losses.opsm(0.5)(scores, batch)[0], np.ones((3, 2)))


# --- adaptive entropy -----------------------------------------------------------------------------


def test_adaptive_entropy_follows_the_entropy(x64):
    piece = losses.adaptive_entropy(0.5, step=0.25, start=0.25, most=0.6)
    state, used = piece.init(), []
    path = []
    for entropy in (0.1, 0.5, 0.4, 0.9, 0.9, 0.9, 0.9, 0.2):
        scores, batch = line(np.zeros(4), entropy=[entropy, entropy - 0.1, entropy, entropy + 0.1])
        found, state = piece.prepare(batch, state)
        value, metrics = piece(scores, dataclasses.replace(batch, prepared=found))
        assert np.ptp(value) == 0
        np.testing.assert_allclose(metrics["policy/entropy_coef"], value[0, 0], rtol=1e-12)
        used.append(float(value[0, 0]))
        path.append(float(state))
    # The rollout trains with the coefficient from before it moved it.
    np.testing.assert_allclose(used, [0.25, 0.5, 0.6, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(path, [0.5, 0.6, 0.6, 0.35, 0.1, 0, 0, 0.25])


def test_adaptive_entropy_is_carried_by_the_algorithm():
    signal, rollout = oracles.world()
    objective = losses.clipped() + losses.adaptive_entropy(0.9, start=0.5) * losses.entropy_bonus()
    algorithm = Algorithm(signals.group_center(), objective, losses.token_mean())
    assert algorithm.requires == {"old_entropy"}
    scores, _ = oracles.loss_world()
    state, found = algorithm.init(), []
    for _ in range(2):
        batch, state = algorithm.assign(signal, state, rollout)
        found.append(algorithm.loss(scores, batch)[1]["policy/entropy_coef"])
    np.testing.assert_allclose(found, [0.5, 0.505], rtol=1e-6)
    empty = dataclasses.replace(rollout, mask=jnp.zeros_like(rollout.mask))
    _, after = algorithm.assign(signal, state, empty)
    jax.tree.map(np.testing.assert_array_equal, after, state)


# --- normalised -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner, expected",
    [
        (losses.icepop(0.95, 1.05), partial(oracles_factors.icepop, low=0.95, high=1.05)),
        (losses.tis(), oracles_factors.tis),
        (losses.top_entropy(), oracles_factors.top_entropy),
        (losses.opsm(0.05), partial(oracles_factors.opsm, delta=0.05)),
        (drop_truncated(), oracles_factors.drop_truncated),
    ],
    ids=label,
)
@pytest.mark.parametrize("seed", [1, 2])
def test_normalised_equals_the_loop(inner, expected, seed, x64):
    scores, batch = oracles.loss_world(seed)
    value, metrics = measured(losses.normalised(inner), scores, batch)
    old = Scores(batch.rollout.need("old_logprobs"), scores.entropy)
    weights = np.asarray(batch.weights)
    mean = np.sum(weights * expected(old, batch)) / np.sum(weights)
    np.testing.assert_allclose(value, expected(scores, batch) / mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics["policy/factor_mean"], mean, rtol=1e-12)


def test_normalised_mask_divides_by_kept_tokens(x64):
    # verl's decoupled mode: the mean over the tokens that are kept.
    signal, rollout = oracles.world(1)
    mask = losses.kl_mask(0.004)
    objective = losses.normalised(mask) * losses.reinforce()
    algorithm = Algorithm(signals.scale(1.0), objective, losses.token_mean())
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    scores = Scores(rollout.need("old_logprobs"), jnp.zeros_like(signal))
    keep = oracles_factors.kl_mask(scores, batch, 0.004) > 0
    assert 0 < keep.sum() < np.sum(rollout.mask)
    loss, _ = algorithm.loss(scores, batch)
    np.testing.assert_allclose(loss, -np.asarray(signal)[keep].mean(), rtol=1e-12)
    # Without it, by all of them.
    plain = Algorithm(signals.scale(1.0), mask * losses.reinforce(), losses.token_mean())
    batch, _ = plain.assign(signal, plain.init(), rollout)
    expected = -np.asarray(signal)[keep].sum() / np.asarray(rollout.mask).sum()
    np.testing.assert_allclose(plain.loss(scores, batch)[0], expected, rtol=1e-12)


def test_any_split_of_a_step_gives_its_gradient(x64):
    signal, rollout = oracles.world(1)
    objective = (
        losses.normalised(losses.icepop(0.95, 1.05))
        * losses.top_entropy(0.5)
        * (losses.m2po(0.004) * drop_truncated() * losses.clipped() + 0.1 * losses.kl())
        + losses.adaptive_entropy(0.9, start=0.5) * losses.entropy_bonus()
    )
    algorithm = Algorithm(signals.group_center(), objective, losses.sequence_mean())
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    scores, _ = oracles.loss_world(1)
    grade = jax.jit(jax.grad(algorithm.loss, has_aux=True))
    whole, metrics = grade(scores, batch)
    assert np.any(np.asarray(whole.logprobs)) and np.any(np.asarray(whole.entropy))
    sums = jax.tree.map(jnp.zeros_like, metrics)
    for rows in (np.arange(0, 3), np.arange(3, 4), np.arange(4, 11)):
        part, part_metrics = grade(*jax.tree.map(lambda x: x[rows], (scores, batch)))  # noqa: B023
        expected = jax.tree.map(lambda x: x[rows], whole)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), part, expected)
        sums = jax.tree.map(jnp.add, sums, part_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), sums, metrics)


def test_normalised_nothing_is_nothing(x64):
    scores, batch = line([3.0, 3.0])
    value, metrics = measured(losses.normalised(losses.icepop()), scores, batch)
    np.testing.assert_array_equal(value, np.zeros((1, 2)))
    assert float(metrics["policy/factor_mean"]) == 0


def test_normalised_keeps_the_state_and_requirements_of_its_factor():
    piece = losses.normalised(losses.adaptive_entropy(0.5, start=0.5) * losses.top_entropy())
    assert piece.requires == {"old_entropy"}  # neither reads the policy in training
    _, batch = oracles.loss_world()
    _, state = piece.prepare(batch, piece.init())
    assert float(state[0]) != 0.5


def test_normalised_asks_for_old_log_probs_only_where_they_are_read():
    signal, rollout = oracles.world()
    bare = dataclasses.replace(rollout, old_logprobs=None)
    for free in (drop_truncated(), losses.top_entropy(), 0.5 * losses.top_entropy()):
        piece = losses.normalised(free)
        assert "old_logprobs" not in piece.requires
        scores, batch = oracles.loss_world()
        batch = dataclasses.replace(batch, rollout=bare)
        prepared, _ = piece.prepare(batch, piece.init())
        value, _ = piece(scores, dataclasses.replace(batch, prepared=prepared))
        mean = np.sum(batch.weights * value) / np.sum(batch.weights)
        np.testing.assert_allclose(mean, 1.0, rtol=1e-5)
    for read in (losses.tis(), losses.tis() * drop_truncated()):
        assert "old_logprobs" in losses.normalised(read).requires


def test_normalised_does_not_mind_the_scale_of_the_weights():
    scores, batch = oracles.loss_world()
    piece, values = losses.normalised(losses.tis()), []
    for scale in (1.0, 1e-3):
        small = dataclasses.replace(batch, weights=scale * batch.weights)
        prepared, _ = piece.prepare(small, None)
        values.append(piece(scores, dataclasses.replace(small, prepared=prepared))[0])
    assert 1 < float(jnp.sum(batch.weights)) < 100
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
