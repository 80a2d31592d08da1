"""Clip-Cov and KL-Cov: which tokens are chosen, and what the choice may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_terms as loops
import pytest
from worlds_terms import ready, table, world

from eqrl import _advantages as signals, _losses as losses
from eqrl.algorithms import Algorithm


CHOOSERS = [
    losses.clip_cov(0.08, low=0.1),
    losses.clip_cov(0.5, low=-9, high=9, seed=1),
    losses.kl_cov(0.2),
]
choosers = pytest.mark.parametrize("objective", CHOOSERS, ids=repr)


def test_the_chosen_are_those_of_the_loop(x64):
    _, batch = world(1)
    chosen = lambda objective: {tuple(x) for x in np.argwhere(ready(objective, batch).prepared)}  # noqa: E731
    for options in ({}, {"share": 0.1, "low": -0.5, "high": 0.5, "seed": 5}):
        expected = loops.clip_cov_chosen(batch, **options)
        assert chosen(losses.clip_cov(**options)) == set(expected) != set()
    for share in (0.0002, 0.3):
        assert chosen(losses.kl_cov(share)) == set(loops.kl_cov_chosen(batch, share)) != set()


def test_clip_cov_takes_all_if_there_are_too_few(x64):
    _, batch = world()
    cov = loops.covariance(batch)
    found = np.asarray(ready(losses.clip_cov(1.0, low=0.5, high=2.0), batch).prepared)
    inside = np.asarray(batch.rollout.mask) & (cov > 0.5) & (cov < 2)
    assert inside.sum() > 1
    np.testing.assert_array_equal(found, inside)
    assert not np.any(ready(losses.clip_cov(high=1.0), batch).prepared)


def test_clip_cov_chooses_evenly_and_anew_for_each_seed(x64):
    rng = np.random.default_rng(0)
    scores, batch = table(np.zeros((64, 32)), rng.standard_normal((64, 32)))
    rollout = dataclasses.replace(
        batch.rollout,
        tokens=jnp.asarray(rng.integers(0, 50, (64, 32)), jnp.int32),
        logprobs=jnp.asarray(-rng.random((64, 32))),
    )
    batch = dataclasses.replace(batch, rollout=rollout)
    build = lambda seed: losses.clip_cov(0.25, low=-99, high=99, seed=seed)  # noqa: E731
    hits = np.sum([ready(build(seed), batch).prepared for seed in range(40)], axis=0)
    assert np.sum(hits) == 40 * 512  # no collision of hashes here
    # Binomial(40, 1/4): mean 10, variance 7.5.
    np.testing.assert_allclose([hits.mean(), hits.var()], [10, 7.5], rtol=0.1)
    np.testing.assert_allclose(hits.mean(axis=0), np.full(32, 10), atol=2)
    np.testing.assert_allclose(hits.mean(axis=1), np.full(64, 10), atol=2.5)


@choosers
def test_the_choice_is_of_tokens_and_not_of_places(objective):
    # In float32, where the means depend on the order of summation.
    _, batch = oracles.loss_world(dtype=jnp.float32)
    chosen = np.asarray(ready(objective, batch).prepared)
    assert chosen.any()
    rows = np.random.default_rng(0).permutation(len(chosen))
    columns = np.random.default_rng(1).permutation(chosen.shape[1])
    for move in (lambda x: x[rows], lambda x: x[:, columns] if x.ndim == 2 else x):
        moved = ready(objective, jax.tree.map(move, batch))
        np.testing.assert_array_equal(moved.prepared, move(chosen))


@choosers
def test_the_choice_does_not_see_micro_batches(objective, x64):
    # Through `assign`, as in training: any partition sums to the same gradient.
    signal, rollout = oracles.world()
    scores, _ = oracles.loss_world()
    objective = objective + 0.1 * losses.positive_nll()
    algorithm = Algorithm(signals.whiten(), objective, losses.token_mean())
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    loss = lambda scores, batch: algorithm.loss(scores, batch)[0]  # noqa: E731
    whole = jax.grad(loss)(scores, batch).logprobs
    for pieces in ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], [[i] for i in range(11)]):
        for rows in pieces:
            part = jax.tree.map(lambda x: x[np.array(rows)], (scores, batch))  # noqa: B023
            found = jax.grad(loss)(*part).logprobs
            np.testing.assert_allclose(found, whole[np.array(rows)], rtol=1e-12, atol=1e-15)


def test_equal_advantages_have_no_covariance():
    _, batch = oracles.loss_world(dtype=jnp.float32)
    same = dataclasses.replace(batch, advantages=jnp.full_like(batch.advantages, 0.1))
    assert not np.any(ready(losses.clip_cov(1.0, low=1e-30), same).prepared)
    assert not np.any(ready(losses.clip_cov(1.0, low=-9, high=-1e-30), same).prepared)


def test_among_equal_covariances_the_hash_decides(x64):
    _, batch = oracles.loss_world()
    # Equal advantages: a covariance of 0 or -0 everywhere. Unequal ones on three tokens: those
    # come first, the rest of the k are of the others.
    for extra in (0.0, 2.0):
        first = jnp.cumsum(batch.rollout.mask.ravel()).reshape(batch.rollout.mask.shape) <= 3
        shift = jnp.where(first & batch.rollout.mask, extra, 0.0)
        rollout = dataclasses.replace(batch.rollout, old_logprobs=shift - 1.0)
        if extra == 0:
            rollout = batch.rollout
        level = dataclasses.replace(batch, advantages=shift + 0.5, rollout=rollout)
        expected = set(loops.kl_cov_chosen(level, 0.2))
        found = {tuple(x) for x in np.argwhere(ready(losses.kl_cov(0.2), level).prepared)}
        assert found == expected and len(found) > 5


def test_unprepared_batches_are_refused():
    scores, batch = oracles.loss_world()
    for objective in CHOOSERS:
        with pytest.raises(ValueError, match=r"algorithm\.assign"):
            objective(scores, batch)
