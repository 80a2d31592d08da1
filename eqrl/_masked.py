"""Mask first, then compute: the few masked reductions every estimator and term shares.

`jnp.where` comes before the arithmetic, never a multiplication after it: a NaN or an infinity at
a masked position must reach neither the value nor the gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._types import Mask, PerRow, PerToken


def zero_unmasked(x: PerToken, mask: Mask) -> PerToken:
    """`x` where `mask`, exactly 0 elsewhere, whatever `x` holds there."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def row_total(x: PerToken, mask: Mask) -> PerRow:
    """Sum of `x` over each row's masked tokens."""
    return jnp.sum(zero_unmasked(x, mask), axis=1)


def row_length(mask: Mask) -> PerRow:
    """Number of masked tokens of each row, as a float."""
    return jnp.sum(mask, axis=1).astype(jnp.result_type(float))


def spread(row: PerRow, mask: Mask) -> PerToken:
    """The row's number on each of its masked tokens, 0 elsewhere."""
    return jnp.where(mask, row[:, None], jnp.zeros((), row.dtype))


def last_token(mask: Mask) -> Mask:
    """True on each row's last masked token."""
    later = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (later == 1)


def on_last(row: PerRow, mask: Mask) -> PerToken:
    """The row's number on its last masked token, 0 elsewhere; empty rows stay 0."""
    return spread(row, last_token(mask))


def outcome(reward: PerRow, mask: Mask) -> PerToken:
    """The per-token signal of a reward for the whole completion: all of it on the last token.

    Args:
        reward: one number a row, for instance the weighted sum of reward components.
        mask: the rollout's mask.

    Returns:
        What an advantage chain starts from; rows without a masked token stay 0.
    """
    return on_last(reward, mask)


def live_rows(mask: Mask) -> Bool[Array, " batch"]:
    """True for rows with at least one masked token."""
    return jnp.any(mask, axis=1)


def group_sum(row: PerRow, group: Int[Array, " batch"]) -> PerRow:
    """For each row, the sum of `row` over the rows that share its group id."""
    return jax.ops.segment_sum(row, group, num_segments=row.shape[0])[group]


def group_first(row: PerRow, live: Bool[Array, " batch"], group: Int[Array, " batch"]) -> PerRow:
    """For each row, the value of its group's first live row.

    Subtracting it before taking means makes constant groups *exactly* zero in any precision
    (a mean of equal floats need not equal them).
    """
    size = row.shape[0]
    index = jnp.where(live, jnp.arange(size), size)
    first = jax.ops.segment_min(index, group, num_segments=size)
    safe = jnp.where(live, row, jnp.zeros((), row.dtype))
    return safe[jnp.clip(first, 0, size - 1)][group]


def token_share(mask: Mask) -> PerToken:
    """`mask / sum(mask)`: weights of an exact token mean; all zero when nothing is masked."""
    count = jnp.sum(mask).astype(jnp.result_type(float))
    return zero_unmasked(jnp.broadcast_to(1.0 / jnp.maximum(count, 1.0), mask.shape), mask)


def scalar_mean(x: Float[Array, " n"], live: Bool[Array, " n"]) -> Float[Array, ""]:
    """Mean of `x` over live entries; 0 when there are none."""
    count = jnp.sum(live).astype(x.dtype)
    return jnp.sum(jnp.where(live, x, jnp.zeros((), x.dtype))) / jnp.maximum(count, 1.0)
