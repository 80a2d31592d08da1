"""Add a constant to each completion's score."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import on_last, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def shift(offset: ScalarLike) -> Stateless:
    """Adds `offset` to each live row's total, on its last masked token; empty rows stay 0.

    Baselines over groups or the batch cancel it; `ema_baseline`, `gae` and `returns` do not.

    Args:
        offset: any finite number.

    Returns:
        A transform from rewards to rewards; it must stand before the signal is spread.
    """
    check_number("offset", offset)
    return stateless(_shift, builder=shift, reads_total=True, offset=offset)


def _shift(signal: PerToken, rollout: Rollout, *, offset: ScalarLike) -> PerToken:
    mask = rollout.mask
    rows = jnp.broadcast_to(jnp.asarray(offset, signal.dtype), mask.shape[:1])
    return zero_unmasked(signal, mask) + on_last(rows, mask)
