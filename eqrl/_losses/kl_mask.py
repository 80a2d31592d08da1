"""Drops completions whose estimated divergence between sampler and trainer is too large."""

import jax.numpy as jnp

from .._checks import check_choice, check_number
from .._kl import KL_ESTIMATORS, kl_estimate
from .._masked import spread
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import kept, log_weight, on_rows, row_means
from .factor import Factor, factor


REDUCTIONS = ("mean", "sum", "max")


def kl_mask(threshold: ScalarLike, *, estimator: str = "k3", reduce: str = "mean") -> Factor:
    r"""1 on completions whose divergence from the sampler is at most `threshold`, 0 on the others.

    Tokens were drawn from the sampler, so what can be estimated without bias is
    $KL(\pi_{sampler} \| \pi_{old})$: with $d = \log\pi_{old} - \log\pi_{sampler}$, `k1` is $-d$,
    `k2` is $d^2/2$ and `k3` is $e^{d} - d - 1$, reduced over the completion's masked tokens. A mask
    only: `tis() * kl_mask(0.01)` weighs too.

    Differs between libraries: verl's `rollout_rs` has the same signs and names
    (`seq_mean_k3`, preset threshold 0.01), with an interval for k1; AReaL estimates with the
    opposite sign of $d$, which changes k1 and k3.

    Args:
        threshold: largest kept divergence in nats (per token for `"mean"` and `"max"`).
        estimator: `"k1"`, `"k2"` or `"k3"`.
        reduce: `"mean"`, `"sum"` or `"max"` over the completion's tokens.

    Returns:
        A factor with metrics `mismatch/masked_frac` and `mismatch/correction_mean`.

    Source: Liu et al. 2025, "When speed kills stability", as in verl's rollout correction.
    """
    check_number("threshold", threshold)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    check_choice("reduce", reduce, REDUCTIONS)
    return factor(
        _kl_mask, builder=kl_mask, threshold=threshold, estimator=estimator, reduce=reduce
    )


def _kl_mask(
    scores: Scores, batch: Batch, *, threshold: ScalarLike, estimator: str, reduce: str
) -> tuple[PerToken, Metrics]:
    mask = batch.rollout.mask
    estimate = kl_estimate(-log_weight(scores, batch), estimator)
    match reduce:
        case "mean":
            divergence = row_means(estimate, batch)
        case "sum":
            divergence = on_rows(estimate, batch)
        case _:
            divergence = spread(jnp.max(jnp.where(mask, estimate, -jnp.inf), axis=1), mask)
    return kept(jnp.ones_like(estimate), divergence <= threshold, batch)
