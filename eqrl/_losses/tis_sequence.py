"""Truncated importance weights of whole completions."""

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import bounded, log_weight, on_rows
from .factor import Factor, factor


def tis_sequence(cap: ScalarLike = 2.0) -> Factor:
    r"""The completion's importance weight, bounded by `cap`, on each of its tokens.

    $\min(\prod_s w_s, cap)$ with $w_s$ as in `tis`. The product of a long completion is seldom near
    1: unbiased but for the bound, and of high variance. The sum of logarithms is taken over masked
    tokens only.

    Differs between libraries: verl's `rollout_is="sequence"` (the default of its dataclass) also
    clamps the sum of logarithms at 20; TRL's `sequence_truncate` does not.

    Args:
        cap: largest weight, above 0.

    Returns:
        A factor with metrics `mismatch/truncated_frac` and `mismatch/correction_mean`.

    Source: Yao et al. 2025 and Liu et al. 2025, "When speed kills stability"; truncation: Ionides
    2008.
    """
    check_number("cap", cap, above=0)
    return factor(_tis_sequence, builder=tis_sequence, cap=cap)


def _tis_sequence(scores: Scores, batch: Batch, *, cap: ScalarLike) -> tuple[PerToken, Metrics]:
    weight = jnp.exp(on_rows(log_weight(scores, batch), batch))
    return bounded(weight, jnp.minimum(weight, cap), batch)
