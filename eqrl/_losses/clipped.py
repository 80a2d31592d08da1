"""PPO's clipped surrogate, one- and two-sided, with optional dual clip."""

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import Ratio, check_ratio, log_ratio


def clipped(
    low: ScalarLike = 0.2,
    high: ScalarLike = 0.2,
    *,
    dual: ScalarLike | None = None,
    ratio: Ratio | None = None,
) -> Term:
    r"""Clipped policy-gradient surrogate.

    With $\rho_t = e^{\log\pi(t) - \log\pi_{old}(t)}$ the value of a token is
    $\max(-A\rho,\; -A\,\mathrm{clip}(\rho, 1-low, 1+high))$. With `dual` (c), tokens of negative
    advantage are further bounded from above: $\min(\cdot, -cA)$; this equals TRL's `delta = c` for
    c >= 1 + high. A ratio exactly on a bound still has its gradient. Masked positions give 0 and
    are masked before the exponential.

    Differs between libraries: verl always applies `dual=3`; DAPO's "clip-higher" is
    `clipped(0.2, 0.28)`. The log-ratio itself is not clamped (verl: at 20 nats).

    Args:
        low: largest decrease of the ratio that is still rewarded, from 0 to 1.
        high: largest increase of the ratio that is still rewarded, not negative.
        dual: bound on the ratio for negative advantages, above 1; `None` for no bound.
        ratio: what is clipped: `token_ratio()` by default, `geometric_ratio()` for GSPO,
            `sequence_ratio()` for whole completions.

    Returns:
        A term with metrics `loss/policy`, `policy/clip_low_frac` (ratio below `1 - low` and
        negative advantage), `policy/clip_high_frac` (ratio above `1 + high` and positive
        advantage), and with `dual` also `policy/dual_clip_frac`.

    Source: Schulman et al. 2017 (arXiv:1707.06347); dual clip: Ye et al. 2019 (arXiv:1912.09729);
    clip-higher: Yu et al. 2025 (arXiv:2503.14476).
    """
    check_number("low", low, least=0, most=1)
    check_number("high", high, least=0)
    if dual is not None:
        check_number("dual", dual, above=1)
    check_ratio(ratio)
    return term(_clipped, builder=clipped, low=low, high=high, dual=dual, ratio=ratio)


def _clipped(
    scores: Scores,
    batch: Batch,
    *,
    low: ScalarLike,
    high: ScalarLike,
    dual: ScalarLike | None,
    ratio: Ratio | None,
) -> tuple[PerToken, Metrics]:
    delta, advantage = (ratio or log_ratio)(scores, batch), batch.advantages
    rho = jnp.exp(delta)
    too_low = (rho < 1 - low) & (advantage < 0)
    too_high = (rho > 1 + high) & (advantage > 0)
    metrics = {
        "policy/clip_low_frac": batch.mean(too_low.astype(rho.dtype)),
        "policy/clip_high_frac": batch.mean(too_high.astype(rho.dtype)),
    }
    held = too_low | too_high
    bound = jnp.where(too_low, 1 - low, 1 + high)
    if dual is not None:
        capped = (rho > dual) & (advantage < 0)
        metrics["policy/dual_clip_frac"] = batch.mean(capped.astype(rho.dtype))
        held, bound = held | capped, jnp.where(capped, dual, bound)
    # Held tokens leave before the exponential, as do those without an advantage: an overflow there
    # would be 0 * inf, forwards or backwards.
    free = jnp.exp(jnp.where(held | (advantage == 0), jnp.zeros_like(delta), delta))
    value = -advantage * jnp.where(held, bound, free)
    return value, metrics | {"loss/policy": weighted(value, batch)}
