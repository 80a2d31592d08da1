"""A per-token cost for leaving the reference policy."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from .._checks import check_choice, check_number
from .._kl import KL_ESTIMATORS, kl_estimate
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def kl_penalty(
    coef: ScalarLike, *, estimator: str = "k1", limit: ScalarLike | None = None
) -> Stateless:
    r"""Subtracts `coef` times a per-token KL estimate from the signal.

    $R_t \leftarrow R_t - coef \cdot k_t$ with $d_t = \log\pi_{old}(t) - \log\pi_{ref}(t)$ and $k_t$
    one of $d$ (`k1`), $d^2/2$ (`k2`), $e^{-d} + d - 1$ (`k3`). $\log\pi_{old}$ is
    `rollout.old_logprobs`, or the sampler's `rollout.logprobs` where that is absent. With `limit`
    the estimate, not $d$, is clamped to $[-limit, limit]$ nats. Unmasked positions get 0.

    Where it stands in a chain matters: before a baseline (`kl_penalty(c) | rloo()`) the baseline
    sees it, after one (`group_center() | kl_penalty(c)`) each token bears its own cost only.

    Differs between libraries: OpenRLHF and AReaL clamp k1 to 10 nats on either side
    (`limit=10.0`), verl does not; default coefficients range from 0 (verl) through 0.01
    (OpenRLHF) and 0.05 (TRL) to 0.1 (AReaL).

    Args:
        coef: cost per nat, not negative.
        estimator: `"k1"`, `"k2"` or `"k3"`; in a reward k1 is the unbiased choice.
        limit: the largest size of the estimate of one token, above 0; `None` for none.

    Returns:
        A transform from rewards to rewards, or advantages to advantages; requires
        `rollout.ref_logprobs`.
    """
    check_number("coef", coef, least=0)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    if limit is not None:
        check_number("limit", limit, above=0)
    return stateless(
        _kl_penalty,
        builder=kl_penalty,
        requires=("ref_logprobs",),
        coef=coef,
        estimator=estimator,
        limit=limit,
    )


def _kl_penalty(
    signal: PerToken,
    rollout: Rollout,
    *,
    coef: ScalarLike,
    estimator: str,
    limit: ScalarLike | None,
) -> PerToken:
    estimate = kl_estimate(reference_gap(rollout, signal.dtype), estimator)
    if limit is not None:
        estimate = jnp.clip(estimate, -limit, limit)
    return zero_unmasked(signal - coef * estimate, rollout.mask)


def reference_gap(rollout: Rollout, dtype: DTypeLike) -> PerToken:
    """Log-ratio of the policy that sampled to the reference, 0 on unmasked positions."""
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    return zero_unmasked(old - rollout.need("ref_logprobs"), rollout.mask).astype(dtype)
