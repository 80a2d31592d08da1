"""Only tokens that are trained go through the output head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def condense(
    function: Callable,
    hidden: Float[Array, "token width"],
    targets: Int[Array, " token"],
    mask: Bool[Array, " token"] | None,
    buffer: int | None,
    shards: int = 1,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """`function` of the tokens that are not masked; 0 for the others.

    The tokens are gathered into one buffer, so that prompts and padding cost nothing in the head.

    Args:
        function: `(hidden, targets, mask) -> (logprobs, entropy)`.
        hidden: of all tokens.
        targets: of all tokens.
        mask: all tokens if `None`.
        buffer: see `token_logprobs`; the length `function` sees, if given.
        shards: see `token_logprobs`.
    """
    if mask is None:
        return function(hidden, targets, None)
    if buffer is None or buffer >= mask.size:
        # What a masked token holds is unknown, and 0 * NaN in a product would spread it.
        logprobs, entropy = function(jnp.where(mask[:, None], hidden, 0), targets, mask)
        return jnp.where(mask, logprobs, 0), jnp.where(mask, entropy, 0)
    # One run of tokens a shard, so that none crosses devices.
    cut = mask.reshape(shards, -1)
    length = cut.shape[1]
    # Places beyond the number of tokens read 0 and write nowhere.
    where = jax.vmap(lambda m: jnp.nonzero(m, size=buffer // shards, fill_value=length)[0])(cut)

    def take(x):
        runs = x.reshape(shards, length, *x.shape[1:])
        taken = jax.vmap(lambda run, at: run.at[at].get(mode="fill", fill_value=0))(runs, where)
        return taken.reshape(-1, *x.shape[1:])

    def spread(x):
        runs, empty = x.reshape(shards, -1), jnp.zeros(cut.shape, x.dtype)
        put = jax.vmap(lambda run, at, values: run.at[at].set(values, mode="drop"))
        return put(empty, where, runs).reshape(-1)

    logprobs, entropy = function(take(hidden), take(targets), (where < length).reshape(-1))
    return spread(logprobs), spread(entropy)
