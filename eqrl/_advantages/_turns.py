"""Turns: maximal runs of consecutive masked tokens, each one step of an episode."""

import jax.numpy as jnp
from jax import lax

from .._masked import zero_unmasked
from .._types import Mask, PerToken
from ._recurrence import backward_sum


def turn_starts(mask: Mask) -> Mask:
    """True on the first token of every turn."""
    return mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def turn_total(signal: PerToken, mask: Mask) -> PerToken:
    """The sum of each turn's signal on its first token, 0 elsewhere."""
    goes_on = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    rest = backward_sum(zero_unmasked(signal, mask), goes_on.astype(signal.dtype))
    return zero_unmasked(rest, turn_starts(mask))


def over_turn(x: PerToken, mask: Mask) -> PerToken:
    """What `x` holds on a turn's first token on all tokens of the turn, 0 elsewhere."""
    column = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    first = lax.cummax(jnp.where(turn_starts(mask), column, jnp.zeros_like(column)), axis=1)
    return zero_unmasked(jnp.take_along_axis(x, first, axis=1), mask)
