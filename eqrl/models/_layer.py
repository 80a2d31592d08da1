"""One decoder layer, or many of them stacked."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ._linear import Linear
from ._norm import rms_norm
from ._rope import Rotary, rotate


class Layer(eqx.Module):
    """Pre-norm attention and SwiGLU feed-forward, split where the keys and values leave.

    A sampler keeps a cache between `qkv` and `finish`, so attention itself is not in here. In
    `Transformer.layers` every array has a leading layer axis; the methods want it sliced off,
    which is what `jax.lax.scan` does.

    Attributes:
        input_norm: gain before attention.
        query: `[d heads*head_dim]`.
        key: `[d kv*head_dim]`.
        value: `[d kv*head_dim]`.
        output: `[heads*head_dim d]`.
        query_norm: gain on each query head (Qwen3), or `None`.
        key_norm: gain on each key head (Qwen3), or `None`.
        post_norm: gain before the feed-forward.
        gate: `[d ff]`, goes through SiLU.
        up: `[d ff]`.
        down: `[ff d]`.
        head_dim: width of a head.
        norm_eps: of all norms.
    """

    input_norm: Float[Array, "*layers d"]
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Float[Array, "*layers head_dim"] | None
    key_norm: Float[Array, "*layers head_dim"] | None
    post_norm: Float[Array, "*layers d"]
    gate: Linear
    up: Linear
    down: Linear
    head_dim: int = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def qkv(
        self, x: Float[Array, "batch time d"], rotary: Rotary
    ) -> tuple[
        Float[Array, "batch time heads head_dim"],
        Float[Array, "batch time kv head_dim"],
        Float[Array, "batch time kv head_dim"],
    ]:
        """Queries, keys and values as attention and a cache want them.

        Args:
            x: the residual stream.
            rotary: `transformer.rotary(positions)`.

        Returns:
            Normed, projected, (q, k) normed per head and turned; and the values.
        """
        normed = rms_norm(x, self.input_norm, self.norm_eps)
        q, k, v = (self._heads(f(normed)) for f in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q = rms_norm(q, self.query_norm, self.norm_eps)
        if self.key_norm is not None:
            k = rms_norm(k, self.key_norm, self.norm_eps)
        return rotate(q, rotary), rotate(k, rotary), v

    def finish(
        self,
        x: Float[Array, "batch time d"],
        attended: Float[Array, "batch time heads head_dim"],
    ) -> Float[Array, "batch time d"]:
        """Adds the attention's output and the feed-forward to the residual stream.

        Args:
            x: what `qkv` was given.
            attended: what `attention` returned.

        Returns:
            The residual stream after the layer.
        """
        x = x + self.output(attended.reshape(*x.shape[:2], -1))
        return x + self.feed_forward(rms_norm(x, self.post_norm, self.norm_eps))

    def feed_forward(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def _heads(self, x):
        return x.reshape(*x.shape[:2], -1, self.head_dim)
