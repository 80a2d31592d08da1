"""A decoder-only transformer: Qwen2, Qwen3 and Llama differ only in which parts are present."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._architecture import Architecture
from ._attention import attention, causal
from ._constrain import constrain
from ._layer import Layer
from ._linear import Linear
from ._norm import rms_norm
from ._rope import Rotary, rotary


class Transformer(eqx.Module):
    """Tokens to hidden states; the caller multiplies with `unembedding` (or never does).

    Attributes:
        embedding: `[vocab d]`.
        layers: one `Layer` whose arrays have a leading layer axis.
        norm: gain of the final norm.
        head: the unembedding of an untied model; `None` when the embedding serves as one.
        architecture: the static facts.
    """

    embedding: Float[Array, "vocab d"]
    layers: Layer
    norm: Float[Array, " d"]
    head: Float[Array, "vocab d"] | None
    architecture: Architecture = eqx.field(static=True)

    @classmethod
    def init(
        cls, architecture: Architecture, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ) -> "Transformer":
        """A model with random weights: normal(0, 0.02) matrices, zero biases, unit gains.

        Args:
            architecture: its shapes.
            key: for the weights.
            dtype: of weights and computation.
        """
        keys = jax.random.split(key, 3)
        shape = (architecture.vocab_size, architecture.width)
        return cls(
            embedding=_normal(keys[0], shape, dtype),
            layers=_init_layers(architecture, keys[1], dtype),
            norm=jnp.ones(architecture.width, dtype),
            head=None if architecture.tied else _normal(keys[2], shape, dtype),
            architecture=architecture,
        )

    @property
    def unembedding(self) -> Float[Array, "vocab d"]:
        """Rows are the output directions of the vocabulary: the embedding itself when tied."""
        return self.embedding if self.head is None else self.head

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time d"]:
        """The tokens' rows of the embedding, in the type of the weights."""
        return constrain(constrain(self.embedding, "looked_up")[tokens], "residual")

    def rotary(self, positions: Int[Array, "batch time"]) -> Rotary:
        """Rotary angles for `Layer.qkv`; the same for all layers."""
        facts = self.architecture
        return rotary(positions, facts.head_dim, facts.rope_theta, facts.rope_scaling)

    def final(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        """The norm after the last layer."""
        return rms_norm(x, self.norm, self.architecture.norm_eps)

    def unstacked(self) -> tuple[Layer, ...]:
        """The layers one by one, each a copy of its slice of the stacked arrays."""
        leaves, tree = jax.tree.flatten(self.layers)
        count = self.architecture.num_layers
        return tuple(jax.tree.unflatten(tree, [leaf[i] for leaf in leaves]) for i in range(count))

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        *,
        remat: bool = False,
    ) -> Float[Array, "batch time d"]:
        """Hidden states after the final norm.

        Args:
            tokens: ids; anything on padding.
            positions: index of each token in its sequence, -1 on padding, which may stand
                anywhere. A token sees the tokens of its row whose position is not larger.
            remat: recompute each layer in the backward pass instead of storing its insides:
                about a third more arithmetic, memory for one layer plus one residual stream a
                layer.

        Returns:
            One vector per token; meaningless but finite on padding.
        """
        rotary = self.rotary(positions)
        visible = causal(positions, positions)

        def step(x, layer: Layer):
            x = constrain(x, "residual")
            q, k, v = layer.qkv(x, rotary)
            return constrain(layer.finish(x, attention(q, k, v, visible)), "residual"), None

        body = jax.checkpoint(step) if remat else step
        x, _ = jax.lax.scan(body, self.embed(tokens), self.layers)
        return constrain(self.final(x), "residual")


def _normal(key, shape, dtype):
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _init_layers(facts: Architecture, key, dtype) -> Layer:
    keys = iter(jax.random.split(key, 7))
    count = facts.num_layers

    def linear(into, out, bias):
        weight = _normal(next(keys), (count, into, out), dtype)
        return Linear(weight, jnp.zeros((count, out), dtype) if bias else None)

    heads, kv = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    head_gain = jnp.ones((count, facts.head_dim), dtype) if facts.qk_norm else None
    return Layer(
        input_norm=jnp.ones((count, facts.width), dtype),
        query=linear(facts.width, heads, facts.attention_bias),
        key=linear(facts.width, kv, facts.attention_bias),
        value=linear(facts.width, kv, facts.attention_bias),
        output=linear(heads, facts.width, facts.output_bias),
        query_norm=head_gain,
        key_norm=head_gain,
        post_norm=jnp.ones((count, facts.width), dtype),
        gate=linear(facts.width, facts.ff_width, facts.mlp_bias),
        up=linear(facts.width, facts.ff_width, facts.mlp_bias),
        down=linear(facts.ff_width, facts.width, facts.mlp_bias),
        head_dim=facts.head_dim,
        norm_eps=facts.norm_eps,
    )
