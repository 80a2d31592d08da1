"""A critic: a transformer with one number per token on top."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._types import wide
from ._previous import previous
from ._transformer import Transformer


class ValueModel(eqx.Module):
    """Predicts the return from *before* each token is chosen.

    The backbone is the critic's own: it shares no arrays with the policy, so the critic may have
    its own learning rate and its loss cannot disturb the policy. Starting from the policy's
    weights is usual and costs a second copy.

    Attributes:
        backbone: gives the hidden states.
        weight: of the head.
        bias: of the head.
    """

    backbone: Transformer
    weight: Float[Array, " d"]
    bias: Float[Array, ""]

    @classmethod
    def init(cls, backbone: Transformer) -> "ValueModel":
        """A critic that predicts 0 everywhere: the head starts at zero, in float32.

        Args:
            backbone: copied, so that donating the policy's arrays leaves the critic alone.
        """
        width = backbone.architecture.width
        copy = jax.tree.map(jnp.copy, backbone)
        dtype = wide(backbone.embedding.dtype)
        return cls(copy, jnp.zeros(width, dtype), jnp.zeros((), dtype))

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        *,
        remat: bool = False,
    ) -> Float[Array, "batch time"]:
        """One value per token, read at the token before it (see `previous`).

        Args:
            tokens: ids; anything on padding.
            positions: index of each token in its sequence, -1 on padding.
            remat: as in `Transformer.__call__`.

        Returns:
            float32 values; meaningless where a token has no token before it.
        """
        hidden = self.backbone(tokens, positions, remat=remat).astype(self.weight.dtype)
        at = jnp.einsum("btd,d->bt", hidden, self.weight)
        at = at + jnp.broadcast_to(self.bias, at.shape)
        return jnp.take_along_axis(at, previous(positions), axis=1)
