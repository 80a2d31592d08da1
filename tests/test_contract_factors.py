"""What every factor promises, whatever it computes. One row a member, in `members_factors.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from members_factors import FACTORS
from test_contract import blind_to_padding, follows_order, poison, same

from eqrl import _losses as losses
from eqrl._parse import parse


factors = pytest.mark.parametrize("member", FACTORS, ids=repr)
varied = pytest.mark.parametrize(
    "member, name, other", [(m, *item) for m in FACTORS for item in m.vary.items()], ids=repr
)


def prepared(piece, batch):
    """The batch with what the piece prepares on all of its rows."""
    found, _ = piece.prepare(batch, piece.init())
    return dataclasses.replace(batch, prepared=found)


def measured(factor, scores, batch):
    """Coefficients and metrics of a batch that is prepared first."""
    return factor(scores, prepared(factor, batch))


def loss_of(factor, scores, batch):
    term = factor * losses.reinforce()
    value, _ = term(scores, prepared(term, batch))
    return jnp.sum(batch.weights * value), measured(factor, scores, batch)


# Compiled once for all members that differ in numbers only: numbers are leaves.
graded = jax.jit(jax.grad(loss_of, argnums=1, has_aux=True))


@factors
def test_factor_keeps_shape_dtype_and_unmasked_zeros(member):
    scores, batch = oracles.loss_world(dtype=jnp.float32)
    _, (value, metrics) = graded(member.build(), scores, batch)
    assert (value.shape, value.dtype) == (scores.logprobs.shape, jnp.float32)
    assert np.all(np.asarray(value)[~np.asarray(batch.rollout.mask)] == 0)
    assert np.any(np.asarray(value) > 0) and np.all(np.asarray(value) >= 0)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())


@factors
def test_factor_keeps_float32_in_x64(member, x64):
    scores, batch = oracles.loss_world(dtype=jnp.float32)
    found = jax.eval_shape(measured, member.build(), scores, batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@factors
def test_factor_jit_equals_eager(member, x64):
    scores, batch = oracles.loss_world()
    _, found = graded(member.build(), scores, batch)
    jax.tree.map(same, found, measured(member.build(), scores, batch))


@varied
def test_factor_vmaps_over_hyperparameters(member, name, other, x64):
    scores, batch = oracles.loss_world()
    piece = member.build()
    named = piece.lifted.hyperparameters if hasattr(piece, "lifted") else vars(piece)
    value_of = lambda x: measured(member.build(**{name: x}), scores, batch)[0]  # noqa: E731
    both = jax.jit(jax.vmap(value_of))(jnp.asarray([named[name], other], float))
    same(both, np.stack([value_of(named[name]), value_of(other)]))
    assert not np.allclose(both[0], both[1])


@factors
def test_factor_ignores_unmasked(member):
    scores, batch = oracles.loss_world()
    mask = batch.rollout.mask
    clean, (out, metrics) = graded(member.build(), scores, batch)
    weights, share = batch.weights, batch.share
    batch = dataclasses.replace(poison(batch, mask), weights=weights, share=share)
    dirty, (dirty_out, dirty_metrics) = graded(member.build(), poison(scores, mask), batch)
    np.testing.assert_array_equal(dirty_out, out)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    jax.tree.map(np.testing.assert_array_equal, dirty_metrics, metrics)
    for leaf in jax.tree.leaves(clean):
        assert np.all(np.isfinite(leaf)) and np.all(np.asarray(leaf)[~np.asarray(mask)] == 0)


@factors
def test_no_gradient_flows_through_a_factor(member, x64):
    scores, batch = oracles.loss_world()
    gradient, (value, _) = graded(member.build(), scores, batch)
    same(gradient.logprobs, -batch.weights * value * batch.advantages)
    assert np.all(np.asarray(gradient.entropy) == 0)


@factors
def test_factor_does_not_see_padding(member):
    blind_to_padding(graded, member.build())


@factors
def test_factor_follows_the_order_of_rows(member, x64):
    follows_order(graded, member.build())


@factors
def test_factor_adds_up_over_any_split(member, x64):
    scores, batch = oracles.loss_world()
    factor = member.build()
    batch = prepared(factor, batch)
    whole, metrics = factor(scores, batch)
    sums = jax.tree.map(jnp.zeros_like, metrics)
    for rows in (np.array([0, 4, 9]), np.array([1]), np.array([2, 3, 5, 6, 7, 8, 10])):
        part = jax.tree.map(lambda x: x[rows], (scores, batch))  # noqa: B023
        value, part_metrics = factor(*part)
        same(value, whole[rows])
        sums = jax.tree.map(jnp.add, sums, part_metrics)
    jax.tree.map(same, sums, metrics)


@factors
def test_factor_survives_a_batch_without_tokens(member):
    scores, batch = oracles.loss_world()
    zero = jnp.zeros_like(batch.weights)
    rollout = dataclasses.replace(batch.rollout, mask=jnp.zeros_like(batch.rollout.mask))
    batch = dataclasses.replace(batch, rollout=rollout, weights=zero, share=zero)
    for leaf in jax.tree.leaves(graded(member.build(), scores, batch)):
        assert np.all(np.asarray(leaf) == 0)


@factors
def test_factor_state_keeps_its_structure(member):
    _, batch = oracles.loss_world()
    factor = member.build()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            state = jax.eval_shape(factor.init)
            found, after = jax.eval_shape(factor.prepare, batch, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.leaves(after) == jax.tree.leaves(state)  # shapes and types
        assert all(x.shape == batch.weights.shape for x in jax.tree.leaves(found))


@factors
def test_factor_prints_as_what_builds_it(member):
    piece = member.build()
    assert parse(repr(piece)) == piece
    assert piece == member.build() and hash(piece) == hash(member.build())
    assert repr(piece).startswith(f"{member.builder.__name__}(")
    weighed = piece * losses.clipped() + 0.04 * losses.kl()
    assert parse(repr(weighed)) == weighed
    assert weighed.requires == piece.requires | {"ref_logprobs"}
