"""An affine map on the last axis."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._contract import contract


class Linear(eqx.Module):
    """`x @ weight + bias`.

    Attributes:
        weight: `[in out]`; with a leading axis when several layers' maps are stacked.
        bias: `[out]`, likewise; `None` for a linear map.
    """

    weight: Float[Array, "*layers input output"]
    bias: Float[Array, "*layers output"] | None = None

    def __call__(self, x: Float[Array, "batch time input"]) -> Float[Array, "batch time output"]:
        """The map, summed in float32 and returned in the type of `x`."""
        y = contract("bti,io->bto", x, self.weight)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(y.dtype), y.shape)
        return y.astype(x.dtype)
