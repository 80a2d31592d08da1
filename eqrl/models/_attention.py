"""Grouped-query attention over an explicit visibility mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._contract import contract


def causal(
    query_positions: Int[Array, "batch query"], key_positions: Int[Array, "batch key"]
) -> Bool[Array, "batch query key"]:
    """True where a query may see a key: the key is no padding and does not come later.

    Columns do not matter, so padding may stand anywhere in a row.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    return (key >= 0) & (key <= query)


def attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key kv head_dim"],
    v: Float[Array, "batch key kv head_dim"],
    visible: Bool[Array, "batch query key"],
) -> Float[Array, "batch query heads head_dim"]:
    r"""$\mathrm{softmax}(q k^T / \sqrt{d}) v$ with `heads / kv` queries on each key head.

    The softmax is float32. Keys and values are not repeated. A query that sees no key gets
    exactly 0, and so do its gradients.

    Args:
        q: queries; head `h` reads key head `h // (heads / kv)`.
        k: keys.
        v: values; finite also where nothing may see them.
        visible: True where the query may see the key.

    Returns:
        One vector per query and head, in the type of `q`.

    Source: Ainslie et al. 2023 (arXiv:2305.13245).
    """
    return attention_head_major(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), visible)


def attention_head_major(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch kv key head_dim"],
    v: Float[Array, "batch kv key head_dim"],
    visible: Bool[Array, "batch query key"],
) -> Float[Array, "batch query heads head_dim"]:
    """`attention` over keys and values that lie head by head, as a cache should.

    With a single query the transposition of a cache that lies key by key costs several times the
    attention itself on CPU.
    """
    batch, time, heads, width = q.shape
    kv = k.shape[1]
    # Queries that read the same keys become the rows of one matrix: a plain batched product.
    grouped = jnp.moveaxis(q.reshape(batch, time, kv, heads // kv, width), 1, 3)
    scores = contract("bgmd,bgkd->bgmk", grouped.reshape(batch, kv, -1, width), k) * width**-0.5
    scores = scores.reshape(*grouped.shape[:4], k.shape[2])
    hidden = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, hidden), axis=-1)
    weights = weights.astype(v.dtype).reshape(batch, kv, -1, k.shape[2])
    attended = contract("bgmk,bgkd->bgmd", weights, v).astype(q.dtype).reshape(grouped.shape)
    sees = jnp.any(visible, axis=-1)[:, :, None, None]
    return jnp.where(sees, jnp.moveaxis(attended, 3, 1).reshape(q.shape), jnp.zeros((), q.dtype))
