"""Wider heads: the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from eqrl.models import Architecture, RopeScaling, Transformer, widen_heads


def _model(scaling=None, **changes) -> Transformer:
    facts = dataclasses.replace(
        Architecture("llama", 37, 16, 2, 4, 2, 8, 24, output_bias=True, attention_bias=True),
        rope_scaling=scaling,
        **changes,
    )
    model = Transformer.init(facts, key=jax.random.key(1))
    return jax.tree.map(lambda x: x * 6 if x.ndim >= 2 else x + 0.1, model)


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        tiny_model(tied=False),
        _model(),
        _model(RopeScaling("linear", 2.0)),
        _model(RopeScaling("llama3", 4.0, 16)),
    ],
    ids=["qwen2", "untied", "llama", "linear", "llama3"],
)
@pytest.mark.parametrize("factor", [2, 4])
def test_a_widened_model_computes_the_same(model, factor):
    tokens = jax.random.randint(jax.random.key(0), (3, 40), 0, 37)
    positions = jnp.broadcast_to(jnp.arange(40), (3, 40))
    wide = widen_heads(model, factor * model.architecture.head_dim)
    assert wide.architecture.head_dim == factor * model.architecture.head_dim
    assert wide.layers.query.weight.shape[2] == factor * model.layers.query.weight.shape[2]
    want, got = model(tokens, positions), wide(tokens, positions)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(want)).max() > 1


def test_heads_of_the_right_width_are_left_alone():
    model = tiny_model()
    assert widen_heads(model, model.architecture.head_dim) is model


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        widen_heads(tiny_model(), 6)
    with pytest.raises(ValueError, match="yarn"):
        widen_heads(_model(RopeScaling("yarn", 4.0, 16)), 16)
    with pytest.raises(ValueError, match="norm"):
        widen_heads(_model(family="qwen3", qk_norm=True, output_bias=False), 16)
