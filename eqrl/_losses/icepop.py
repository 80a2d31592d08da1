"""Importance weights inside a band, nothing outside."""

import jax.numpy as jnp

from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import kept, log_weight
from .clamp_weights import check_bounds
from .factor import Factor, factor


def icepop(low: ScalarLike = 0.5, high: ScalarLike = 5.0) -> Factor:
    r"""Each token's importance weight where it lies in `[low, high]`, 0 elsewhere.

    $w_t\,1[low \le w_t \le high]$ with $w_t$ as in `tis`. The weights of the reduction stay what
    they were, so masking shrinks the step; `normalised(icepop())` restores it.

    Differs between libraries: OpenRLHF, NeMo and slime call it icepop; AReaL's is
    `rejection_sampling` with `action=mask`, TRL's `token_mask` with free bounds. All of them
    divide by all tokens, except verl's decoupled mode, which divides by the kept ones (that is
    `normalised` of the mask alone).

    Args:
        low: smallest kept weight, from 0.
        high: largest kept weight, above 0; both ends are kept.

    Returns:
        A factor with metrics `mismatch/masked_frac` and `mismatch/correction_mean`.

    Source: Ling Team 2025 (IcePop, arXiv:2510.18855).
    """
    check_bounds(low, high)
    return factor(_icepop, builder=icepop, low=low, high=high)


def _icepop(
    scores: Scores, batch: Batch, *, low: ScalarLike, high: ScalarLike
) -> tuple[PerToken, Metrics]:
    weight = jnp.exp(log_weight(scores, batch))
    return kept(weight, (weight >= low) & (weight <= high), batch)
