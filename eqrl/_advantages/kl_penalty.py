"""A per-token cost for leaving the reference policy."""

from .._checks import check_choice, check_number
from .._kl import KL_ESTIMATORS, kl_estimate
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def kl_penalty(coef: ScalarLike, *, estimator: str = "k1") -> Stateless:
    r"""Subtracts `coef` times a per-token KL estimate from the signal.

    $R_t \leftarrow R_t - coef \cdot k_t$ with $d_t = \log\pi_{old}(t) - \log\pi_{ref}(t)$ and $k_t$
    one of $d$ (`k1`), $d^2/2$ (`k2`), $e^{-d} + d - 1$ (`k3`). $\log\pi_{old}$ is
    `rollout.old_logprobs`, or the sampler's `rollout.logprobs` where that is absent. Unmasked
    positions get 0. Nothing is clamped.

    Where it stands in a chain matters: before a baseline (`kl_penalty(c) | rloo()`) the baseline
    sees it, after one (`group_center() | kl_penalty(c)`) each token bears its own cost only.

    Differs between libraries: OpenRLHF and AReaL clamp k1 to 10 nats on either side; default
    coefficients range from 0 (verl) through 0.01 (OpenRLHF) and 0.05 (TRL) to 0.1 (AReaL).

    Args:
        coef: cost per nat, not negative.
        estimator: `"k1"`, `"k2"` or `"k3"`; in a reward k1 is the unbiased choice.

    Returns:
        A transform from rewards to rewards, or advantages to advantages; requires
        `rollout.ref_logprobs`.
    """
    check_number("coef", coef, least=0)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    return stateless(
        _kl_penalty,
        builder=kl_penalty,
        requires=("ref_logprobs",),
        coef=coef,
        estimator=estimator,
    )


def _kl_penalty(
    signal: PerToken, rollout: Rollout, *, coef: ScalarLike, estimator: str
) -> PerToken:
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    difference = zero_unmasked(old - rollout.need("ref_logprobs"), rollout.mask)
    cost = coef * kl_estimate(difference.astype(signal.dtype), estimator)
    return zero_unmasked(signal - cost, rollout.mask)
