"""CISPO: the importance weight is clipped, the token never is."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import Ratio, check_ratio, log_ratio


def cispo(max_weight: ScalarLike | None = 5.0, *, ratio: Ratio | None = None) -> Term:
    r"""Policy gradient under an importance weight with an *absolute cap* and no lower bound.

    The value of a token is $-\mathrm{sg}(\min(\rho, m))\,A\,e^{\log\pi - \mathrm{sg}(\log\pi)}$: it
    *equals* $-\min(\rho, m) A$ and its gradient is $-\min(\rho, m)\,A\,\nabla\log\pi$. `max_weight`
    is the largest weight itself: 5.0 means "at most five times", and `cispo(0.2)` would weaken
    *every* token to a fifth or less. For bounds written as distances from 1 (0.2 and 0.28) there is
    `cispo_around_one`. No token's gradient is ever 0 for its ratio.

    Differs between libraries: TRL and Liger cap absolutely, as here, and call the cap
    `epsilon_high`; the paper's formula, verl, AReaL, slime and NeMo clip around 1, so their high of
    4.0 is a cap of 5.0 here. The paper switches its lower bound off, so that the two agree.

    Args:
        max_weight: the largest weight, above 0; `None` for no cap.
        ratio: what is capped: `token_ratio()` by default, `geometric_ratio()` or
            `sequence_ratio()` for one weight per completion.

    Returns:
        A term with metrics `loss/policy`, `policy/weight` (token mean of the weight) and
        `policy/clip_high_frac` (ratio above the cap, whatever the advantage).

    Source: MiniMax 2025 (MiniMax-M1, arXiv:2506.13585).
    """
    if max_weight is not None:
        check_number("max_weight", max_weight, above=0)
    check_ratio(ratio)
    return term(_cispo, builder=cispo, max_weight=max_weight, ratio=ratio)


def _cispo(
    scores: Scores, batch: Batch, *, max_weight: ScalarLike | None, ratio: Ratio | None
) -> tuple[PerToken, Metrics]:
    rho = jnp.exp((ratio or log_ratio)(scores, batch))
    above = jnp.zeros_like(rho) if max_weight is None else (rho > max_weight).astype(rho.dtype)
    weight = rho if max_weight is None else jnp.minimum(rho, max_weight)
    value, metrics = reweighted(weight, scores, batch)
    return value, metrics | {"policy/clip_high_frac": batch.mean(above)}


def cispo_around_one(
    low: ScalarLike = 0.2, high: ScalarLike = 0.28, *, ratio: Ratio | None = None
) -> Term:
    r"""Policy gradient under an importance weight clipped to *offsets from 1*.

    The value of a token is
    $-\mathrm{sg}(\mathrm{clip}(\rho, 1-low, 1+high))\,A\,e^{\log\pi - \mathrm{sg}(\log\pi)}$, its
    gradient the clipped weight times $-A\,\nabla\log\pi$. `high=0.28` caps the weight at 1.28; the
    cap of 5 that `cispo` has is `high=4.0` here. `low=1` leaves no lower bound. No token's gradient
    is ever 0 for its ratio.

    Differs between libraries: verl, AReaL, slime and NeMo as here; TRL and Liger use an absolute
    cap without a lower bound, which is `cispo`.

    Args:
        low: the weight is at least `1 - low`; from 0 to 1.
        high: the weight is at most `1 + high`; not negative.
        ratio: see `cispo`.

    Returns:
        A term with metrics `loss/policy`, `policy/weight` (token mean of the weight),
        `policy/clip_low_frac` and `policy/clip_high_frac` (ratio outside, whatever the advantage).

    Source: MiniMax 2025 (MiniMax-M1, arXiv:2506.13585).
    """
    check_number("low", low, least=0, most=1)
    check_number("high", high, least=0)
    check_ratio(ratio)
    return term(_cispo_around_one, builder=cispo_around_one, low=low, high=high, ratio=ratio)


def _cispo_around_one(
    scores: Scores, batch: Batch, *, low: ScalarLike, high: ScalarLike, ratio: Ratio | None
) -> tuple[PerToken, Metrics]:
    rho = jnp.exp((ratio or log_ratio)(scores, batch))
    value, metrics = reweighted(jnp.clip(rho, 1 - low, 1 + high), scores, batch)
    fractions = {
        "policy/clip_low_frac": batch.mean((rho < 1 - low).astype(rho.dtype)),
        "policy/clip_high_frac": batch.mean((rho > 1 + high).astype(rho.dtype)),
    }
    return value, metrics | fractions


def reweighted(weight: PerToken, scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
    r"""REINFORCE under a detached weight: value $-wA$, gradient $-wA\,\nabla\log\pi$.

    Where the advantage is 0 the weight may be infinite.
    """
    weight = lax.stop_gradient(weight)
    logprobs = zero_unmasked(scores.logprobs, batch.rollout.mask)
    finite = jnp.where(batch.advantages == 0, jnp.zeros_like(weight), weight)
    value = -finite * batch.advantages * jnp.exp(logprobs - lax.stop_gradient(logprobs))
    return value, {"loss/policy": weighted(value, batch), "policy/weight": batch.mean(weight)}
