"""Divergence from the reference policy as a loss."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_choice, check_number
from .._kl import KL_ESTIMATORS, kl_estimate
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import log_ratio


def kl(
    estimator: str = "k3",
    *,
    gradient: str | None = None,
    limit: ScalarLike | None = None,
    input_limit: ScalarLike | None = None,
    unbiased: bool = False,
) -> Term:
    r"""Per-token KL estimate between the policy in training and the reference.

    With $d = \log\pi - \log\pi_{ref}$: `k3` is $e^{-d} + d - 1$ with gradient
    $(1 - e^{-d})\nabla\log\pi$ (never negative; grows fast for $d \ll 0$; in expectation the
    gradient of the *other* divergence, $KL(\pi_{ref}\|\pi)$); `k2` is $d^2/2$ with gradient
    $d\,\nabla\log\pi$, the on-policy gradient of $KL(\pi\|\pi_{ref})$; `k1` is $d$, whose gradient
    is 0 in expectation: of use as a reward (`kl_penalty`), not here. Nothing is clamped unless
    asked for.

    `gradient="k2"` takes the value of `estimator` and the gradient of k2 (straight-through).
    `unbiased` multiplies by $\rho = e^{\log\pi - \log\pi_{old}}$, through which gradient flows: the
    estimate corrects for tokens drawn from the old policy, and the gradient of k3 becomes
    $\rho\,d\,\nabla\log\pi$, that of $KL(\pi\|\pi_{ref})$ exactly.

    Differs between libraries: verl and slime clamp k3's output at 10, verl its input at 20
    (`kl(limit=10, input_limit=20)`), OpenRLHF everything at 10; TRL nothing. A clamp turns the
    gradient off where it matters most. verl's `k3+` is `kl(gradient="k2", ...)`, its gradient not
    clamped, as here. `unbiased` is TRL's `use_bias_correction_kl` and slime's
    `--use-unbiased-kl`; on the first update it is the score-function factor of NeMo.

    Args:
        estimator: `"k1"`, `"k2"` or `"k3"`.
        gradient: the estimator whose gradient is taken in place of its own; `None` for its own.
        limit: the estimate is clamped to `[-limit, limit]`; above 0.
        input_limit: $d$ is clamped to `[-input_limit, input_limit]`; above 0.
        unbiased: whether to multiply by the ratio, after the clamps.

    Returns:
        A term with metrics `loss/kl` (before any coefficient, under the algorithm's weights) and
        `ref/kl_k3` (token mean of the plain k3 in nats); requires `rollout.ref_logprobs`.

    Source: Shao et al. 2024 (GRPO, arXiv:2402.03300), equation 4; estimators: Schulman 2020,
    "Approximating KL divergence"; unbiased: DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv:2512.02556).
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    check_choice("gradient", gradient, (None, *KL_ESTIMATORS))
    for name, bound in (("limit", limit), ("input_limit", input_limit)):
        if bound is not None:
            check_number(name, bound, above=0)
    if unbiased and gradient is not None:
        raise ValueError(
            f"gradient={gradient!r} has no meaning with unbiased=True, which gives the estimate a "
            "gradient of its own; leave one of them out"
        )
    return term(
        _kl,
        builder=kl,
        requires=("ref_logprobs",),
        estimator=estimator,
        gradient=gradient,
        limit=limit,
        input_limit=input_limit,
        unbiased=unbiased,
    )


def _kl(
    scores: Scores,
    batch: Batch,
    *,
    estimator: str,
    gradient: str | None,
    limit: ScalarLike | None,
    input_limit: ScalarLike | None,
    unbiased: bool,
) -> tuple[PerToken, Metrics]:
    reference = batch.rollout.need("ref_logprobs")
    raw = zero_unmasked(scores.logprobs - reference, batch.rollout.mask)
    difference = raw if input_limit is None else jnp.clip(raw, -input_limit, input_limit)
    value = kl_estimate(difference, estimator)
    value = value if limit is None else jnp.clip(value, -limit, limit)
    if gradient is not None:
        moving = kl_estimate(raw, gradient)
        value = lax.stop_gradient(value) + moving - lax.stop_gradient(moving)
    if unbiased:
        value = jnp.exp(log_ratio(scores, batch)) * value
    metrics = {
        "loss/kl": weighted(value, batch),
        "ref/kl_k3": batch.mean(kl_estimate(raw, "k3")),
    }
    return value, metrics
