"""Bound the signal."""

import jax
import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def clip(limit: ScalarLike, *, low: ScalarLike | None = None) -> Stateless:
    r"""Clips every token's signal to $[-limit, limit]$, or to $[low, limit]$.

    Unmasked positions get 0, also where 0 lies outside the bounds. Clipping rewards (before a
    baseline) and clipping advantages (after it) are two algorithms; the place in the chain says
    which.

    Differs between libraries: OpenRLHF clips to 10 the reward *after* the baseline, AReaL to 20
    the raw reward; NeMo has separate bounds of the advantage (here: `clip(high, low=low)`).

    Args:
        limit: the upper bound; above 0 where it is also the magnitude of the lower one.
        low: the lower bound, below `limit`; `None` stands for `-limit`.

    Returns:
        A transform of any per-token signal.
    """
    if low is None:
        check_number("limit", limit, above=0)
    else:
        check_number("limit", limit)
        check_number("low", low, below=None if isinstance(limit, jax.Array) else limit)
    return stateless(_clip, builder=clip, limit=limit, low=low)


def _clip(
    signal: PerToken, rollout: Rollout, *, limit: ScalarLike, low: ScalarLike | None
) -> PerToken:
    bounded = jnp.clip(signal, -limit if low is None else low, limit)
    return zero_unmasked(bounded, rollout.mask)
