"""The definition: all logits at once, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._types import ScalarLike, wide
from .online import contract


def reference(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, " token"] | None = None,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Holds `[token, vocab]` arrays."""
    del mask
    accumulate = wide(hidden.dtype)
    logits = contract("td,vd->tv", hidden, unembedding, accumulate)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    temperature = lax.stop_gradient(jnp.asarray(temperature, accumulate))
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    chosen = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
