"""Generalised advantage estimation that reaches further in longer completions."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import row_length, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import advantage_sum


def gae_adaptive(gamma: ScalarLike = 1.0, *, alpha: ScalarLike = 0.05) -> Stateless:
    r"""GAE whose $\lambda$ grows with the length of the completion.

    `gae(gamma, lam)` with $\lambda_i = \mathrm{clip}(1 - 1/(\alpha L_i), 0, 1)$ for row $i$, $L_i$
    its number of masked tokens: the weights $\lambda^k$ then add up to about $\alpha L_i$, a fixed
    share of the completion. Rows of at most $1/\alpha$ tokens (20 by default) have $\lambda = 0$.
    Gaps in the mask are carried over and do not count as length. After a row's last masked token
    value and advantage are 0, truncated rows included. Unmasked positions and empty rows get 0.

    The paper adapts the policy's advantages only and trains the critic with $\lambda = 1$: give
    the algorithm the target `gae(lam=1.0) | add_values()`.

    Args:
        gamma: discount per trained token, from 0 to 1.
        alpha: share of the completion to average over, above 0.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.values`.

    Source: Yue et al. 2025 (VAPO, arXiv:2504.05118).
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("alpha", alpha, above=0)
    return stateless(
        _gae_adaptive,
        builder=gae_adaptive,
        requires=("values",),
        reads_total=True,
        spreads=True,
        gamma=gamma,
        alpha=alpha,
    )


def _gae_adaptive(
    signal: PerToken, rollout: Rollout, *, gamma: ScalarLike, alpha: ScalarLike
) -> PerToken:
    mask = rollout.mask
    length = jnp.maximum(row_length(mask).astype(signal.dtype), 1)
    lam = jnp.clip(1 - 1 / (alpha * length), 0, 1)[:, None]
    values = zero_unmasked(rollout.need("values").astype(signal.dtype), mask)
    reward = zero_unmasked(signal, mask)
    return zero_unmasked(advantage_sum(reward, values, mask, gamma, lam), mask)
