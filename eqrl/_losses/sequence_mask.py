"""Drops completions whose importance weight is too large."""

import jax.numpy as jnp

from .._checks import check_choice, check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import kept, log_weight, on_rows
from .factor import Factor, factor


WEIGHTS = ("sequence", "token")


def sequence_mask(cap: ScalarLike = 3.0, *, weight: str = "sequence") -> Factor:
    r"""Importance weights of completions whose whole weight is at most `cap`, 0 for the others.

    A completion is kept if $\prod_s w_s \le cap$, with $w_s$ as in `tis`. Each of its tokens then
    weighs $\prod_s w_s$ with `weight="sequence"`, its own $w_t$ with `weight="token"`. The
    weights of the reduction stay, so masking shrinks the step (`normalised` restores it).

    Differs between libraries: this is TRL's default (`sequence_mask`, `clip_max=3.0`, on whenever
    vLLM samples); it weighs kept tokens by the product, divides by all tokens, and has an optional
    lower bound. Because the product drifts with length, it masks long completions wholesale
    (trl#4772): `geometric_mask` does not.

    Args:
        cap: largest kept product, above 0; itself kept.
        weight: what a kept token weighs: `"sequence"` (the product) or `"token"`.

    Returns:
        A factor with metrics `mismatch/masked_frac` and `mismatch/correction_mean`.

    Source: Liu et al. 2025, "When speed kills stability" (masked importance sampling).
    """
    check_number("cap", cap, above=0)
    check_choice("weight", weight, WEIGHTS)
    return factor(_sequence_mask, builder=sequence_mask, cap=cap, weight=weight)


def _sequence_mask(
    scores: Scores, batch: Batch, *, cap: ScalarLike, weight: str
) -> tuple[PerToken, Metrics]:
    logarithm = log_weight(scores, batch)
    product = jnp.exp(on_rows(logarithm, batch))
    return kept(product if weight == "sequence" else jnp.exp(logarithm), product <= cap, batch)
