"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._contract import accumulator


def rms_norm(
    x: Float[Array, "*shape d"], weight: Float[Array, " d"], eps: float
) -> Float[Array, "*shape d"]:
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w$ over the last axis, in float32.

    Args:
        x: any array.
        weight: the gain.
        eps: added to the mean square.

    Returns:
        The normalised array in the type of `x`.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    wide = x.astype(accumulator(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = (wide * scale).astype(x.dtype)
    return normed * jnp.broadcast_to(weight, x.shape)
