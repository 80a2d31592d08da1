"""One token from each row of logits, with one uniform number a row."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


_BLOCK = 128


def draw(
    logits: Float[Array, "batch vocab"], uniform: Float[Array, " batch"]
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """The inverse of the distribution function, in two levels, and the log-prob of the token.

    A uniform number a row costs nothing; Gumbel noise would cost one random number and two
    logarithms a vocabulary entry, as much as the output head itself on a CPU. The sum over blocks
    of 128 entries finds the block, the running sum inside it finds the token. A token of
    probability 0 is never drawn.

    Args:
        logits: unnormalised log-probs, already divided by the temperature.
        uniform: in `[0, 1)`.

    Returns:
        Token ids, and their log-probs under the softmax of `logits`.
    """
    batch, vocab = logits.shape
    peak = jnp.max(logits, axis=1, keepdims=True)
    p = jnp.pad(jnp.exp(logits - peak), [(0, 0), (0, -vocab % _BLOCK)])
    blocks = p.reshape(batch, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=2)
    ends = jnp.cumsum(sums, axis=1)
    total = ends[:, -1]
    block = _first_above(ends, sums, uniform * total)
    before = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    column = _first_above(jnp.cumsum(inside, axis=1), inside, uniform * total - before)
    token = block * _BLOCK + column
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - peak[:, 0] - jnp.log(total)


def _first_above(
    ends: Float[Array, "batch entry"],
    weights: Float[Array, "batch entry"],
    target: Float[Array, " batch"],
) -> Int[Array, " batch"]:
    """Index of the first running sum above the target, never past the last positive weight.

    Rounding can leave the target at or above the last sum; an entry of weight 0 must not win.
    """
    index = jnp.sum(ends <= target[:, None], axis=1, dtype=jnp.int32)
    entries = jnp.arange(ends.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(weights > 0, entries[None, :], 0), axis=1)
    return jnp.minimum(index, last)
