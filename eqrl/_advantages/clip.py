"""Bound the signal."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def clip(limit: ScalarLike) -> Stateless:
    r"""Clips every token's signal to $[-limit, limit]$; unmasked positions get 0.

    Clipping rewards (before a baseline) and clipping advantages (after it) are two algorithms;
    the place in the chain says which.

    Args:
        limit: largest magnitude, above 0.

    Returns:
        A transform of any per-token signal.
    """
    check_number("limit", limit, above=0)
    return stateless(_clip, builder=clip, limit=limit)


def _clip(signal: PerToken, rollout: Rollout, *, limit: ScalarLike) -> PerToken:
    return zero_unmasked(jnp.clip(signal, -limit, limit), rollout.mask)
