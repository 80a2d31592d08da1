"""Drops completions that drifted, whatever their length."""

import jax.numpy as jnp

from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import kept, log_weight, row_means
from .clamp_weights import check_bounds
from .factor import Factor, factor


def geometric_mask(low: ScalarLike = 0.999, high: ScalarLike = 1.002) -> Factor:
    r"""Token weights of completions whose mean weight lies in `[low, high]`, 0 for the others.

    A completion is kept if $low \le e^{\frac1L\sum_s \log w_s} \le high$, the geometric mean of its
    $L$ token weights ($w_s$ as in `tis`); its tokens weigh their own $w_t$, which nothing bounds.
    The criterion does not drift with length as the product of `sequence_mask` does.

    Differs between libraries: OpenRLHF's `seq-mask-tis` (its comment speaks of clamped token
    weights, its code leaves them raw, as here); verl's `seq_mean_k1` gives the mask alone.

    Args:
        low: smallest kept geometric mean, from 0.
        high: largest kept geometric mean, above 0; both ends are kept.

    Returns:
        A factor with metrics `mismatch/masked_frac` and `mismatch/correction_mean`.

    Source: Liu et al. 2025, "When speed kills stability" (geometric masking).
    """
    check_bounds(low, high)
    return factor(_geometric_mask, builder=geometric_mask, low=low, high=high)


def _geometric_mask(
    scores: Scores, batch: Batch, *, low: ScalarLike, high: ScalarLike
) -> tuple[PerToken, Metrics]:
    logarithm = log_weight(scores, batch)
    mean = jnp.exp(row_means(logarithm, batch))
    return kept(jnp.exp(logarithm), (mean >= low) & (mean <= high), batch)
