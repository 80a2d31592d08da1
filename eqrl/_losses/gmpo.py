"""GMPO: the geometric mean of clipped token ratios."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import row_length, row_total, spread
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import log_ratio


def gmpo(low: ScalarLike = 0.4, high: ScalarLike = 0.4) -> Term:
    r"""Geometric-mean surrogate: tokens are clipped, a completion's mean is taken in logs.

    With $\Delta_t = \log\pi(t) - \log\pi_{old}(t)$, each token is clipped on the side that its own
    advantage rewards, *in log space*: $\tilde\Delta = \min(\Delta, high)$ where $A > 0$,
    $\max(\Delta, -low)$ where $A < 0$. Every token of the completion has the value
    $-A_t\,e^{\frac1L\sum_s\tilde\Delta_s}$. The gradient goes through the tokens that were not
    clipped, $1/L$ each. The paper's loss is this under `sequence_mean()`, with one advantage per
    completion; a token of advantage 0 is not clipped.

    Differs between libraries: `low` and `high` bound the log-ratio: 0.4 allows ratios from 0.67 to
    1.49. verl passes its `clip_ratio` (0.2) as this bound and takes a plain mean over the rows of
    each micro-batch, empty ones included.

    Args:
        low: largest decrease of the log-ratio that is still rewarded, in nats; not negative.
        high: largest increase of the log-ratio that is still rewarded, in nats; not negative.

    Returns:
        A term with metrics `loss/policy`, `policy/clip_low_frac` and `policy/clip_high_frac`
        (tokens clipped on that side).

    Source: Zhao et al. 2025 (GMPO, arXiv:2507.20673).
    """
    check_number("low", low, least=0)
    check_number("high", high, least=0)
    return term(_gmpo, builder=gmpo, low=low, high=high)


def _gmpo(
    scores: Scores, batch: Batch, *, low: ScalarLike, high: ScalarLike
) -> tuple[PerToken, Metrics]:
    mask, advantage = batch.rollout.mask, batch.advantages
    delta = log_ratio(scores, batch)
    too_low = (delta < -low) & (advantage < 0)
    too_high = (delta > high) & (advantage > 0)
    bounded = jnp.where(too_low, -low, jnp.where(too_high, high, delta))
    length = jnp.maximum(row_length(mask), 1).astype(delta.dtype)
    mean = spread(row_total(bounded, mask) / length, mask)
    # Without an advantage an overflow of the exponential would be 0 * inf.
    value = -advantage * jnp.exp(jnp.where(advantage == 0, jnp.zeros_like(mean), mean))
    metrics = {
        "loss/policy": weighted(value, batch),
        "policy/clip_low_frac": batch.mean(too_low.astype(delta.dtype)),
        "policy/clip_high_frac": batch.mean(too_high.astype(delta.dtype)),
    }
    return value, metrics
