"""A model with wider heads that computes the same."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._architecture import Architecture
from ._layer import Layer
from ._linear import Linear
from ._transformer import Transformer


def widen_heads(model: Transformer, head_dim: int) -> Transformer:
    """The same function of tokens, with heads of `head_dim`, for engines that know no other width.

    New channels are zero. Each rotary plane moves to where the wider head has its frequency, and
    queries take up that scores are divided by the square root of the width. Equal up to rounding:
    the factor on the queries' weights is no power of two unless `head_dim / old` is one of four.

    Args:
        model: with heads whose width divides `head_dim`.
        head_dim: the new width.

    Returns:
        The widened model; the same model if its heads are that wide.

    Raises:
        ValueError: if its heads cannot be widened so.
    """
    facts = model.architecture
    if facts.head_dim == head_dim:
        return model
    _refuse(facts, head_dim)
    return _widen(model, head_dim)


def _refuse(facts: Architecture, head_dim: int) -> None:
    if head_dim % facts.head_dim:
        raise ValueError(f"head_dim={head_dim} must be a multiple of the model's {facts.head_dim}")
    if facts.qk_norm:
        raise ValueError("heads with a norm of their own (qwen3) cannot be widened")
    if facts.rope_scaling is not None and facts.rope_scaling.kind == "yarn":
        raise ValueError("heads under yarn rope scaling cannot be widened")


@eqx.filter_jit
def _widen(model: Transformer, head_dim: int) -> Transformer:
    old, layers = model.architecture.head_dim, model.layers
    half = np.arange(old // 2) * (head_dim // old)
    turned = np.concatenate([half, half + head_dim // 2])  # where rotary planes go
    kept = np.arange(old)

    def outwards(linear: Linear, places: np.ndarray, scale: float = 1.0) -> Linear:
        def widen(x):
            heads = x.reshape(*x.shape[:-1], -1, old)
            wide = jnp.zeros((*heads.shape[:-1], head_dim), x.dtype)
            wide = wide.at[..., places].set((heads * scale).astype(x.dtype))
            return wide.reshape(*x.shape[:-1], -1)

        return jax.tree.map(widen, linear)

    weight = layers.output.weight
    rows = weight.reshape(weight.shape[0], -1, old, weight.shape[2])
    wide = jnp.zeros((*rows.shape[:2], head_dim, rows.shape[3]), weight.dtype)
    wide = wide.at[:, :, kept].set(rows).reshape(weight.shape[0], -1, weight.shape[2])
    fields = {f.name: getattr(layers, f.name) for f in dataclasses.fields(Layer)}
    fields |= {
        "query": outwards(layers.query, turned, float(np.sqrt(head_dim / old))),
        "key": outwards(layers.key, turned),
        "value": outwards(layers.value, kept),
        "output": dataclasses.replace(layers.output, weight=wide),
        "head_dim": head_dim,
    }
    facts = dataclasses.replace(model.architecture, head_dim=head_dim)
    return Transformer(model.embedding, Layer(**fields), model.norm, model.head, facts)
