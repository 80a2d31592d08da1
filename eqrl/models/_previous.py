"""Where the token before a token stands."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def previous(positions: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """For each column, the column of the token whose position is one less in the same row.

    What predicts (or values) the token at column `t` is the hidden state at `previous[:, t]`,
    wherever padding or gaps stand. Where there is none (first tokens and padding) it is 0, and
    the caller masks.

    Args:
        positions: index of each token in its sequence, -1 on padding; distinct within a row.

    Returns:
        Column indices in `[0, time)`.
    """
    before = positions[:, :, None] - 1
    is_before = (positions[:, None, :] == before) & (before >= 0)
    return jnp.argmax(is_before, axis=2).astype(positions.dtype)
