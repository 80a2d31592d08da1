"""Only tokens that are trained go through the output head."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def condense(
    function: Callable,
    hidden: Float[Array, "token width"],
    targets: Int[Array, " token"],
    mask: Bool[Array, " token"] | None,
    buffer: int | None,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """`function` of the tokens that are not masked; 0 for the others.

    The tokens are gathered into one buffer, so that prompts and padding cost nothing in the head.

    Args:
        function: `(hidden, targets, mask) -> (logprobs, entropy)`.
        hidden: of all tokens.
        targets: of all tokens.
        mask: all tokens if `None`.
        buffer: see `token_logprobs`; the length `function` sees, if given.
    """
    if mask is None:
        return function(hidden, targets, None)
    if buffer is None or buffer >= mask.size:
        # What a masked token holds is unknown, and 0 * NaN in a product would spread it.
        logprobs, entropy = function(jnp.where(mask[:, None], hidden, 0), targets, mask)
        return jnp.where(mask, logprobs, 0), jnp.where(mask, entropy, 0)
    # Places beyond the number of tokens read 0 and write nowhere.
    (where,) = jnp.nonzero(mask, size=buffer, fill_value=mask.size)
    taken = hidden.at[where].get(mode="fill", fill_value=0)
    logprobs, entropy = function(
        taken, targets.at[where].get(mode="fill", fill_value=0), where < mask.size
    )
    return _spread(logprobs, where, mask), _spread(entropy, where, mask)


def _spread(x, where, mask):
    return jnp.zeros(mask.shape, x.dtype).at[where].set(x, mode="drop")
