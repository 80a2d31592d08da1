"""Divergence from the reference policy as a loss."""

from .._checks import check_choice
from .._kl import KL_ESTIMATORS, kl_estimate
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, Scores
from .base import Term, term, weighted


def kl(estimator: str = "k3") -> Term:
    r"""Per-token KL estimate between the policy in training and the reference.

    With $d = \log\pi - \log\pi_{ref}$: `k3` is $e^{-d} + d - 1$ with gradient
    $(1 - e^{-d})\nabla\log\pi$ (never negative; grows fast for $d \ll 0$); `k2` is $d^2/2$ with
    gradient $d\,\nabla\log\pi$, the on-policy gradient of the KL; `k1` is $d$, whose gradient is 0
    in expectation: of use as a reward (`kl_penalty`), not here. Nothing is clamped.

    Differs between libraries: verl clamps k3's input at 20 and output at 10, OpenRLHF everything
    at 10, which turns the gradient off where it matters most; TRL does not clamp.

    Args:
        estimator: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        A term with metrics `loss/kl` (before any coefficient, under the algorithm's weights) and
        `ref/kl_k3` (token mean in nats); requires `rollout.ref_logprobs`.

    Source: Shao et al. 2024 (GRPO, arXiv:2402.03300), equation 4.
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    return term(_kl, builder=kl, requires=("ref_logprobs",), estimator=estimator)


def _kl(scores: Scores, batch: Batch, *, estimator: str) -> tuple[PerToken, Metrics]:
    reference = batch.rollout.need("ref_logprobs")
    difference = zero_unmasked(scores.logprobs - reference, batch.rollout.mask)
    value = kl_estimate(difference, estimator)
    metrics = {
        "loss/kl": weighted(value, batch),
        "ref/kl_k3": batch.mean(kl_estimate(difference, "k3")),
    }
    return value, metrics
