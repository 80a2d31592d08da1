"""What every transform, term and weighting promises, whatever it computes. One row a member."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from members_factors import FACTORS, TERM_OPTIONS
from members_terms import RATIOS, TERMS, WEIGHTINGS
from members_transforms import TRANSFORMS

from eqrl import _advantages as signals, _losses as losses
from eqrl._parse import parse
from eqrl._types import Batch, Rollout, Scores


transforms = pytest.mark.parametrize("member", TRANSFORMS, ids=repr)
TERMS = TERMS + TERM_OPTIONS
terms = pytest.mark.parametrize("member", TERMS, ids=repr)
weightings = pytest.mark.parametrize("member", WEIGHTINGS, ids=repr)
varied = lambda table: pytest.mark.parametrize(  # noqa: E731
    "member, name, other", [(m, *item) for m in table for item in m.vary.items()], ids=repr
)


def run(transform, signal, rollout):
    return transform.update(signal, transform.init(), rollout)[0]


def same(a, b):
    """Equal up to the rounding of a different order of summation."""
    tolerance = 1e-12 if np.asarray(b).dtype == np.float64 else 2e-5
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def per_token(tree, change):
    """`change` on every float `[batch, time]` leaf."""
    floating = lambda x: x.shape[1:] == (8,) and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if floating(x) else x, tree)


def per_row(tree, change):
    """`change` on every float leaf `[batch]` or `[batch, component]`."""
    floating = lambda x: x.shape[1:] in ((), (2,)) and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if x.ndim and floating(x) else x, tree)


def poison(tree, mask):
    """NaN or an infinity on every unmasked position, NaN on empty rows, of every float array."""
    poisons = np.resize([np.nan, np.inf, -np.inf], mask.shape)
    tree = per_token(tree, lambda x: jnp.asarray(np.where(mask, x, poisons), x.dtype))
    return per_row(tree, lambda x: jnp.where(mask.any(axis=1), x.T, jnp.nan).T.astype(x.dtype))


def pad(x, fill):
    """Two columns and three rows of `fill` more."""
    return jnp.asarray(np.pad(x, [(0, 3), (0, 2)][: x.ndim], constant_values=fill))


def pad_rows(x, fill):
    """Three rows of `fill` more."""
    return jnp.asarray(np.pad(x, [(0, 3), (0, 0)][: x.ndim], constant_values=fill))


def padded(rollout: Rollout) -> Rollout:
    wide = per_token(rollout, lambda x: pad(x, jnp.nan))
    return dataclasses.replace(
        wide,
        tokens=pad(rollout.tokens, 0),
        mask=pad(rollout.mask, False),
        positions=pad(rollout.positions, -1),
        group=pad(rollout.group, 1),
        truncated=pad(rollout.truncated, False),
        rewards=pad_rows(rollout.need("rewards"), jnp.nan),
        greedy_rewards=pad_rows(rollout.need("greedy_rewards"), jnp.nan),
        version=pad_rows(rollout.need("version"), 0),
    )


def probed(transform, signal, rollout, probe):
    out = run(transform, signal, rollout)
    return jnp.sum(out * probe), out


# Compiled once for all members that differ in numbers only: numbers are leaves.
graded_transform = jax.jit(jax.grad(probed, argnums=1, has_aux=True))


def twice(transform, signal, rollout):
    """The second of two updates, so that state matters."""
    _, state = transform.update(signal, transform.init(), rollout)
    return transform.update(signal, state, rollout)


# --- transforms -----------------------------------------------------------------------------------


@transforms
def test_transform_keeps_shape_dtype_and_unmasked_zeros(member):
    signal, rollout = oracles.world(dtype=jnp.float32)
    _, out = graded_transform(member.build(), signal, rollout, signal)
    assert (out.shape, out.dtype) == (signal.shape, jnp.float32)
    assert np.all(np.asarray(out)[~np.asarray(rollout.mask)] == 0)
    assert np.any(np.asarray(out) != 0)


@transforms
def test_transform_keeps_float32_in_x64(member, x64):
    # That it keeps float64 is what the comparisons to 1e-12 need.
    signal, rollout = oracles.world(dtype=jnp.float32)
    assert jax.eval_shape(run, member.build(), signal, rollout).dtype == jnp.float32


@transforms
def test_transform_jit_equals_eager(member):
    # Hyperparameters are leaves, options are structure: plain `jax.jit` takes the transform.
    signal, rollout = oracles.world()
    transform = member.build()
    _, out = graded_transform(transform, signal, rollout, signal)
    same(out, run(transform, signal, rollout))


@varied(TRANSFORMS)
def test_transform_vmaps_over_hyperparameters(member, name, other, x64):
    signal, rollout = oracles.world()
    first = member.build().lifted.hyperparameters[name] if name != "decay" else 0.95
    both = jnp.asarray([first, other], float)
    build = lambda value: member.build(**{name: value})  # noqa: E731
    together = jax.jit(jax.vmap(lambda value: twice(build(value), signal, rollout)))(both)
    compiled = jax.jit(twice)
    apart = [compiled(build(value), signal, rollout) for value in (first, other)]
    jax.tree.map(lambda both, *one: same(both, np.stack(one)), together, *apart)
    if name != "decay":  # in a batch just like the last the average is the same for any decay
        assert not np.allclose(*together[0])


@transforms
def test_transform_ignores_unmasked(member):
    signal, rollout = oracles.world()
    transform, mask, probe = member.build(), rollout.mask, rollout.logprobs
    clean, out = graded_transform(transform, signal, rollout, probe)
    dirty_world = poison(signal, mask), poison(rollout, mask)
    dirty, dirty_out = graded_transform(transform, *dirty_world, probe)
    np.testing.assert_array_equal(dirty_out, out)
    np.testing.assert_array_equal(dirty, clean)
    assert np.all(np.isfinite(clean)) and np.all(np.asarray(clean)[~np.asarray(mask)] == 0)


@transforms
def test_transform_does_not_see_padding(member):
    signal, rollout = oracles.world()
    transform, probe = member.build(), rollout.logprobs
    gradient, out = graded_transform(transform, signal, rollout, probe)
    wide = pad(signal, np.nan), padded(rollout), pad(probe, 1.0)
    wide_gradient, wide_out = graded_transform(transform, *wide)
    same(wide_out, pad(out, 0.0))
    same(wide_gradient, pad(gradient, 0.0))


@transforms
def test_transform_follows_the_order_of_rows_and_names_of_groups(member, x64):
    signal, rollout = oracles.world()
    rng = np.random.default_rng(5)
    order, names = rng.permutation(len(signal)), jnp.asarray(rng.permutation(11), jnp.int32)
    moved = jax.tree.map(lambda x: x[order], rollout)
    moved = dataclasses.replace(moved, group=names[moved.group])
    _, out = graded_transform(member.build(), signal, rollout, signal)
    _, moved_out = graded_transform(member.build(), signal[order], moved, signal)
    same(moved_out, out[order])


@transforms
def test_transform_survives_a_batch_without_tokens(member):
    signal, rollout = oracles.world()
    empty = dataclasses.replace(rollout, mask=jnp.zeros_like(rollout.mask))
    for x in graded_transform(member.build(), signal, empty, signal):
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("member", [m for m in TRANSFORMS if m.constant_is_zero], ids=repr)
def test_equal_scores_give_exactly_zero(member):
    _, rollout = oracles.world(dtype=jnp.float32)
    mask = jnp.zeros((15, 8), bool).at[:, 3:5].set(True)
    fifteen = Rollout(
        tokens=jnp.zeros((15, 8), jnp.int32),
        mask=mask,
        positions=jnp.zeros((15, 8), jnp.int32),
        logprobs=jnp.zeros((15, 8)),
        group=jnp.zeros(15, jnp.int32),
        truncated=jnp.zeros(15, bool),
    )
    compiled, nothing = jax.jit(run), np.zeros((15, 8), np.float32)
    for score in (7.41, 0.1, -3.3, 1e-3, 2e6):
        signal = jnp.zeros((15, 8), jnp.float32).at[:, 4].set(score)
        fifteen = dataclasses.replace(fifteen, rewards=jnp.full((15, 2), score, jnp.float32))
        for function in (run, compiled):
            np.testing.assert_array_equal(function(member.build(), signal, fifteen), nothing)


@transforms
def test_transform_declares_what_chains_must_know(member, x64):
    _, rollout = oracles.world()
    transform, mask = member.build(), np.asarray(rollout.mask)
    tokens = [np.flatnonzero(row) for row in mask]
    reward = np.zeros(mask.shape)
    moved = reward.copy()
    for row, columns in enumerate(tokens):
        if len(columns):
            reward[row, columns[-1]] = moved[row, columns[0]] = 0.3 + 0.7 * row % 2
    more = reward.copy()
    more[0, tokens[0][-1]] += 5.0
    out, elsewhere, other = (
        np.asarray(run(transform, jnp.asarray(x), rollout)) for x in (reward, moved, more)
    )
    # Spread: a reward on the last token is felt on the row's others.
    early = tokens[0][:-1]
    felt = bool(np.any(other[0, early] != out[0, early]))
    # Values make a return of any reward; without discounted future nothing is felt early.
    unfelt = ("add_values()", "returns(gamma=0.0)", "gae(gamma=0, lam=0)")
    assert transform.spreads == (felt or repr(member) in unfelt)
    # A part that does not mind where in a row the reward stands reads its total.
    if not transform.starts and np.allclose(out, elsewhere):
        assert transform.reads_total


@transforms
def test_transform_state_keeps_its_structure(member):
    signal, rollout = oracles.world()
    transform = member.build()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            state = jax.eval_shape(transform.init)
            _, after = jax.eval_shape(transform.update, signal, state, rollout)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.leaves(after) == jax.tree.leaves(state)  # shapes and types


@pytest.mark.parametrize("member", TRANSFORMS + TERMS + RATIOS + WEIGHTINGS, ids=repr)
def test_member_prints_as_what_builds_it(member):
    piece = member.build()
    assert parse(repr(piece)) == piece
    assert piece == member.build() and hash(piece) == hash(member.build())
    assert repr(piece).startswith(f"{member.builder.__name__}(")


def test_every_member_has_a_row_and_a_source():
    public = {
        x
        for module in (signals, losses)
        for name, x in vars(module).items()
        if callable(x) and not name.startswith("_")
    }
    rows = TRANSFORMS + TERMS + FACTORS + RATIOS + WEIGHTINGS
    assert public == {m.builder for m in rows}
    for builder in public:
        words = builder.__doc__ or ""
        assert "Source:" in words or "Returns:" in words, builder


# --- terms ----------------------------------------------------------------------------------------


def ready(term, batch: Batch) -> Batch:
    """The whole batch after the term has prepared it, as `Algorithm.assign` does."""
    return dataclasses.replace(batch, prepared=term.prepare(batch, term.init())[0])


def loss_of(term, scores: Scores, batch: Batch):
    value, metrics = term(scores, batch)
    return jnp.sum(batch.weights * value), (value, metrics)


graded = jax.jit(jax.grad(loss_of, argnums=1, has_aux=True))


def assessed(term, scores: Scores, batch: Batch):
    """Gradient, value and metrics of a whole batch."""
    return graded(term, scores, ready(term, batch))


@terms
def test_term_keeps_shape_dtype_and_unmasked_zeros(member):
    scores, batch = oracles.loss_world(dtype=jnp.float32)
    _, (value, metrics) = assessed(member.build(), scores, batch)
    assert (value.shape, value.dtype) == (scores.logprobs.shape, jnp.float32)
    assert np.all(np.asarray(value)[~np.asarray(batch.rollout.mask)] == 0)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())


@terms
def test_term_keeps_float32_in_x64(member, x64):
    scores, batch = oracles.loss_world(dtype=jnp.float32)
    term = member.build()
    found = jax.eval_shape(lambda: term(scores, ready(term, batch)))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@terms
def test_term_jit_equals_eager(member, x64):
    scores, batch = oracles.loss_world()
    term = member.build()
    batch = ready(term, batch)
    jax.tree.map(same, jax.jit(ready)(term, batch), batch)
    _, found = graded(term, scores, batch)
    jax.tree.map(same, found, term(scores, batch))


@varied(TERMS)
def test_term_vmaps_over_hyperparameters(member, name, other, x64):
    scores, batch = oracles.loss_world()
    first = member.build().lifted.hyperparameters[name]

    def value_of(x):
        term = member.build(**{name: x})
        return term(scores, ready(term, batch))[0]

    both = jax.jit(jax.vmap(value_of))(jnp.asarray([first, other], float))
    same(both, np.stack([value_of(first), value_of(other)]))
    assert not np.allclose(both[0], both[1])


@terms
def test_term_ignores_unmasked(member):
    scores, batch = oracles.loss_world()
    term, mask = member.build(), batch.rollout.mask
    clean, (out, metrics) = assessed(term, scores, batch)
    spoil = lambda x: dataclasses.replace(  # noqa: E731
        poison(x, mask), weights=batch.weights, share=batch.share
    )
    batch = spoil(ready(term, spoil(batch)))
    dirty, (dirty_out, dirty_metrics) = graded(term, poison(scores, mask), batch)
    np.testing.assert_array_equal(dirty_out, out)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    jax.tree.map(np.testing.assert_array_equal, dirty_metrics, metrics)
    for leaf in jax.tree.leaves(clean):
        assert np.all(np.isfinite(leaf)) and np.all(np.asarray(leaf)[~np.asarray(mask)] == 0)


def blind_to_padding(graded, piece):
    """What `graded` says of a term or a factor does not change with padded rows and columns."""
    scores, batch = oracles.loss_world()
    wide = Batch(
        padded(batch.rollout),
        pad(batch.advantages, jnp.nan),
        pad(batch.weights, 0.0),
        pad(batch.share, 0.0),
        pad(batch.targets, jnp.nan),
    )
    wide_scores = per_token(scores, lambda x: pad(x, jnp.nan))
    gradient, (value, metrics) = graded(piece, scores, batch)
    wide_gradient, (wide_value, wide_metrics) = graded(piece, wide_scores, wide)
    same(wide_value, pad(value, 0.0))
    jax.tree.map(same, wide_metrics, metrics)
    jax.tree.map(lambda a, b: same(a, pad(b, 0.0)), wide_gradient, gradient)


def follows_order(graded, piece):
    """Permuted rows give the permuted values and the same metrics."""
    scores, batch = oracles.loss_world()
    order = np.random.default_rng(5).permutation(len(batch.weights))
    moved_scores, moved = jax.tree.map(lambda x: x[order], (scores, batch))
    _, (value, metrics) = graded(piece, scores, batch)
    _, (moved_value, moved_metrics) = graded(piece, moved_scores, moved)
    same(moved_value, value[order])
    jax.tree.map(same, moved_metrics, metrics)


@terms
def test_term_does_not_see_padding(member):
    blind_to_padding(assessed, member.build())


@terms
def test_term_follows_the_order_of_rows(member, x64):
    follows_order(assessed, member.build())


@terms
def test_term_adds_up_over_any_split(member, x64):
    scores, batch = oracles.loss_world()
    batch = ready(member.build(), batch)
    whole_gradient, (_, metrics) = graded(member.build(), scores, batch)
    pieces = [np.array([0, 4, 9]), np.array([1]), np.array([2, 3, 5, 6, 7, 8, 10])]
    sums = jax.tree.map(jnp.zeros_like, metrics)
    for rows in pieces:
        part = jax.tree.map(lambda x: x[rows], (scores, batch))  # noqa: B023
        gradient, (_, part_metrics) = graded(member.build(), *part)
        jax.tree.map(lambda a, b: same(a, b[rows]), gradient, whole_gradient)  # noqa: B023
        sums = jax.tree.map(jnp.add, sums, part_metrics)
    jax.tree.map(same, sums, metrics)


@terms
def test_term_survives_a_batch_without_tokens(member):
    scores, batch = oracles.loss_world()
    zero = jnp.zeros_like(batch.weights)
    rollout = dataclasses.replace(batch.rollout, mask=jnp.zeros_like(batch.rollout.mask))
    batch = dataclasses.replace(batch, rollout=rollout, weights=zero, share=zero)
    for leaf in jax.tree.leaves(assessed(member.build(), scores, batch)):
        assert np.all(np.asarray(leaf) == 0)


# --- weightings -----------------------------------------------------------------------------------


@weightings
def test_weighting_does_not_see_padding_and_survives_emptiness(member):
    _, rollout = oracles.world()
    weights = member.build()(rollout.mask)
    assert np.all(np.asarray(weights)[~np.asarray(rollout.mask)] == 0)
    # With `count_empty` a row of padding is a row by definition: there, only columns are added.
    rows = 0 if member.arguments.get("count_empty") else 3
    wide = lambda x, fill: jnp.pad(x, [(0, rows), (0, 2)], constant_values=fill)  # noqa: E731
    np.testing.assert_array_equal(member.build()(wide(rollout.mask, False)), wide(weights, 0.0))
    assert np.all(np.asarray(member.build()(jnp.zeros_like(rollout.mask))) == 0)
    same(jax.jit(member.build())(rollout.mask), weights)


@varied(WEIGHTINGS)
def test_weighting_vmaps_over_hyperparameters(member, name, other, x64):
    _, rollout = oracles.world()
    first = float(member.build().lifted.hyperparameters[name])
    value_of = lambda x: member.build(**{name: x})(rollout.mask)  # noqa: E731
    both = jax.vmap(value_of)(jnp.asarray([first, other]))
    same(both, jnp.stack([value_of(first), value_of(other)]))
