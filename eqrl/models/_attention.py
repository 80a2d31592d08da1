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
    batch, time, heads, width = q.shape
    grouped = q.reshape(batch, time, k.shape[2], heads // k.shape[2], width)
    scores = contract("bqgrd,bkgd->bgrqk", grouped, k) * width**-0.5
    hidden = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, hidden), axis=-1)
    attended = contract("bgrqk,bkgd->bqgrd", weights.astype(v.dtype), v).astype(q.dtype)
    sees = jnp.any(visible, axis=-1)[:, :, None, None]
    return jnp.where(sees, attended.reshape(q.shape), jnp.zeros((), q.dtype))
