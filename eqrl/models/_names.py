"""What each array of a `Transformer` is called in a Hugging Face checkpoint."""

import dataclasses
import functools
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._architecture import Architecture
from ._transformer import Transformer


_WHOLE = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_OF_LAYER = {
    "input_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of the model.

    Attributes:
        path: attribute names from the model down to the array.
        names: of its tensors in the checkpoint: one, or one a layer for stacked arrays.
        shape: of one such tensor *in the checkpoint*.
        transposed: the checkpoint has `[out in]`, the model `[in out]`.
        stacked: the model's array has a leading layer axis.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    stacked: bool


def abstract(architecture: Architecture, dtype: DTypeLike = jnp.float32) -> Transformer:
    """The model's tree with a `jax.ShapeDtypeStruct` for each array: for plans, nothing is made.

    Args:
        architecture: its shapes.
        dtype: of the weights.
    """
    make = functools.partial(Transformer.init, architecture, dtype=dtype)
    return eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))


def entries(architecture: Architecture) -> Iterator[Entry]:
    """All arrays in the order of the model's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract(architecture))
    for keys, leaf in leaves:
        path = tuple(key.name for key in keys)
        if path[0] != "layers":
            yield Entry(path, (_WHOLE[path[0]],), leaf.shape, False, False)
            continue
        suffix = ".".join((_OF_LAYER[path[1]], *path[2:]))
        names = tuple(f"model.layers.{i}.{suffix}" for i in range(leaf.shape[0]))
        turn = len(leaf.shape) == 3
        shape = leaf.shape[:0:-1] if turn else leaf.shape[1:]
        yield Entry(path, names, shape, turn, True)
