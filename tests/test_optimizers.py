"""Decay masks over stacked layers, the schedule, Muon per layer, and the pair of optimizers."""

from typing import Any

import config as cli
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from build import build_optimizer
from helpers import tiny_model

from eqrl import _optimizer
from eqrl.models import ValueModel


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax mixes types on its own; the training step wraps it the same way.
    with jax.numpy_dtype_promotion("standard"):
        yield


def _parameters(**kwargs) -> Any:
    return eqx.filter(tiny_model(**kwargs), eqx.is_inexact_array)


def _pair(**kwargs) -> Any:
    """A policy without a critic."""
    return _parameters(**kwargs), None


def _update(optimizer, *arguments) -> Any:
    return jax.jit(optimizer.update)(*arguments)


def _names(tree) -> dict:
    leaves, _ = jtu.tree_flatten_with_path(tree)
    return {jtu.keystr(path).removeprefix("."): leaf for path, leaf in leaves}


def test_only_matrices_inside_layers_decay():
    yes = {
        name
        for name, value in _names(_optimizer.matrices(_parameters(tied=False))).items()
        if value
    }
    linear = ("query", "key", "value", "output", "gate", "up", "down")
    assert yes == {f"layers.{name}.weight" for name in linear}


def test_the_number_of_axes_would_lie():
    stacked = _names(_parameters())
    assert stacked["layers.query.bias"].ndim == stacked["embedding"].ndim == 2


def test_a_critics_head_does_not_decay():
    critic = eqx.filter(ValueModel.init(tiny_model()), eqx.is_inexact_array)
    decays = _names(_optimizer.matrices(critic))
    assert decays["backbone.layers.up.weight"]
    assert not decays["weight"] and not decays["bias"]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_decay_reaches_matrices_and_nothing_else(name):
    words = ["--optim.name", name, "--optim.weight-decay", "0.1", "--optim.lr", "0.5"]
    optimizer = build_optimizer(cli.parse(words), 10)
    params = _pair()
    zero = jax.tree.map(jnp.zeros_like, params)
    change, _ = _update(optimizer, zero, optimizer.init(params), params)
    for key, leaf in _names(change[0]).items():
        expected = -0.05 * _names(params[0])[key] if key.endswith(".weight") else 0.0
        np.testing.assert_allclose(leaf, np.broadcast_to(expected, leaf.shape), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_each_optimizer_descends_in_every_leaf(name, getkey):
    optimizer = build_optimizer(cli.parse(["--optim.name", name, "--optim.lr", "0.1"]), 10)
    params = _pair()
    gradient = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), params)
    change, _ = _update(optimizer, gradient, optimizer.init(params), params)
    for key, leaf in _names(change[0]).items():
        assert float(jnp.sum(leaf * _names(gradient[0])[key])) < 0, key


def test_optimizers_differ(getkey):
    params = _pair()
    gradient = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), params)
    changes = []
    for name in ("adamw", "lion", "sgd", "muon"):
        optimizer = build_optimizer(cli.parse(["--optim.name", name, "--optim.lr", "0.1"]), 10)
        change, _ = _update(optimizer, gradient, optimizer.init(params), params)
        changes.append(np.asarray(change[0].layers.up.weight))
    for i, a in enumerate(changes):
        for b in changes[:i]:
            assert np.abs(a - b).sum() > 1e-3


def test_muon_orthogonalises_each_layer_on_its_own(getkey):
    params = _parameters()
    gradient = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), params)
    optimizer = _optimizer.muon(1.0)
    change, _ = _update(optimizer, gradient, optimizer.init(params), params)
    # Another gradient in layer 1 leaves layer 0 alone ...
    where = lambda tree: tree.layers.up.weight  # noqa: E731
    other = eqx.tree_at(where, gradient, where(gradient).at[1].multiply(-3.0))
    changed, _ = _update(optimizer, other, optimizer.init(params), params)
    np.testing.assert_allclose(where(change)[0], where(changed)[0], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(where(change)[1] - where(changed)[1])).max() > 1e-2
    # ... and each layer's singular values are pressed together: 0.2 sqrt(24) times about 1.
    values = np.linalg.svd(np.asarray(where(change)), compute_uv=False) / (0.2 * np.sqrt(24))
    assert values.shape == (2, 16)
    assert values.min() > 0.5 and values.max() < 1.4
    raw = np.linalg.svd(np.asarray(where(gradient)), compute_uv=False)
    assert raw.max() / raw.min() > 3


def test_muon_leaves_vectors_and_tables_to_adam(getkey):
    params = _parameters()
    gradient = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), params)
    optimizer = _optimizer.muon(0.01)
    change, _ = _update(optimizer, gradient, optimizer.init(params), params)
    adam = optax.adamw(0.01, weight_decay=0.0, nesterov=True)
    expected, _ = _update(adam, gradient, adam.init(params), params)
    for key in ("embedding", "norm", "layers.query.bias", "layers.input_norm"):
        np.testing.assert_allclose(_names(change)[key], _names(expected)[key], rtol=1e-5)


def test_warmup_cosine_counts_updates():
    rate = _optimizer.warmup_cosine(2.0, 10, warmup_updates=4)
    rates = [float(rate(n)) for n in range(11)]
    cosine = [1 + np.cos(np.pi * n / 6) for n in range(6)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0, *cosine, 0.0], rtol=1e-6, atol=1e-6)
    assert min(rates[:10]) > 0


def test_warmup_cosine_under_strict_types_and_jit():
    with jax.numpy_dtype_promotion("strict"):
        rate = jax.jit(_optimizer.warmup_cosine(1.0, 5))(jnp.zeros((), jnp.int32))
    assert float(rate) == 1.0


def test_warmup_must_leave_something():
    with pytest.raises(ValueError, match="shorten the warm-up"):
        _optimizer.warmup_cosine(1.0, 4, warmup_updates=4)


def test_the_schedule_of_a_ppo_run_ends_with_its_updates():
    words = ["--algo.name", "ppo", "--steps", "5", "--optim.schedule", "warmup_cosine"]
    chosen = cli.parse([*words, "--optim.lr", "1.0"])
    updates = cli.derived(chosen)["updates"]
    rate = cli.schedule(chosen, 1.0, updates)
    assert updates == 40
    assert float(rate(0)) > 0 and float(rate(updates - 1)) > 0 and float(rate(updates)) == 0


def test_policy_and_critic_have_their_own_rates_and_clipping():
    words = ["--algo.name", "ppo", "--optim.lr", "1e-3", "--optim.critic-lr", "1e-2"]
    optimizer = build_optimizer(cli.parse([*words]), 10)
    policy, critic = {"x": jnp.ones(3)}, {"y": jnp.ones(3)}
    state = optimizer.init((policy, critic))
    huge = ({"x": jnp.full(3, 1e6)}, {"y": jnp.ones(3)})
    change, _ = _update(optimizer, huge, state, (policy, critic))
    np.testing.assert_allclose(change[0]["x"], -1e-3, rtol=1e-3)
    np.testing.assert_allclose(change[1]["y"], -1e-2, rtol=1e-3)
    # The policy's huge gradient does not shrink the critic's.
    plain = optax.sgd(1.0)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), plain)
    pair = _optimizer.actor_critic(clipped, clipped)
    small = (huge[0], {"y": jnp.full(3, 0.1)})
    change, _ = _update(pair, small, pair.init((policy, critic)), (policy, critic))
    np.testing.assert_allclose(change[1]["y"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(change[0]["x"]), 1.0, rtol=1e-6)


def test_state_is_float32_for_bfloat16_parameters():
    params = _pair(dtype=jnp.bfloat16)
    optimizer = build_optimizer(cli.parse([]), 10)
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    change, state = _update(optimizer, gradient, state, params)
    for leaf in jax.tree.leaves((state, change)):
        assert leaf.dtype != jnp.bfloat16
    new = jax.jit(optax.apply_updates)(params, change)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))


def test_narrow_weights_follow_their_float32_masters():
    def after(transformation, steps=400, change=1e-4):
        weight = jnp.ones((2, 2), jnp.bfloat16)
        gradient = jnp.full((2, 2), change, jnp.bfloat16)
        with jax.numpy_dtype_promotion("standard"):
            state = transformation.init(weight)
            for _ in range(steps):
                update, state = transformation.update(gradient, state, weight)
                weight = optax.apply_updates(weight, update)
        return float(weight[0, 0])  # pyright: ignore

    assert after(optax.sgd(1.0)) == 1.0, "bfloat16 moves by so little: the test shows nothing"
    # 400 steps of 1e-4 (as bfloat16 holds it), then one rounding to 1/256.
    np.testing.assert_allclose(after(_optimizer.float32_state(optax.sgd(1.0))), 0.96, atol=2**-8)
