"""The definition: all logits at once, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._types import ScalarLike, wide


def reference(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    temperature: ScalarLike,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Holds `[token, vocab]` arrays."""
    accumulate = wide(hidden.dtype)
    logits = jnp.einsum("td,vd->tv", hidden, unembedding, preferred_element_type=accumulate)
    log_p = jax.nn.log_softmax(logits / jnp.asarray(temperature, accumulate), axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
