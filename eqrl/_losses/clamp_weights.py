"""Importance weights clamped on both sides."""

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import bounded, log_weight
from .factor import Factor, factor


def clamp_weights(low: ScalarLike = 0.5, high: ScalarLike = 5.0) -> Factor:
    r"""Each token's importance weight, clamped to `[low, high]`.

    $\mathrm{clip}(w_t, low, high)$ with $w_t$ as in `tis`. No token's gradient vanishes.

    Differs between libraries: OpenRLHF calls this `tis`; everywhere else TIS has no lower bound.

    Args:
        low: smallest weight, from 0.
        high: largest weight, above 0.

    Returns:
        A factor with metrics `mismatch/truncated_frac` (either side) and
        `mismatch/correction_mean`.

    Source: Yao et al. 2025, in OpenRLHF's two-sided form.
    """
    check_bounds(low, high)
    return factor(_clamp_weights, builder=clamp_weights, low=low, high=high)


def check_bounds(low: ScalarLike, high: ScalarLike) -> None:
    """Refuses an interval of weights that is empty or reaches below 0."""
    check_number("low", low, least=0)
    check_number("high", high, above=0)
    if isinstance(low, int | float):
        check_number("high", high, least=low)


def _clamp_weights(
    scores: Scores, batch: Batch, *, low: ScalarLike, high: ScalarLike
) -> tuple[PerToken, Metrics]:
    weight = jnp.exp(log_weight(scores, batch))
    return bounded(weight, jnp.clip(weight, low, high), batch)
