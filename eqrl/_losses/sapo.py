"""SAPO: a soft gate in place of the clip."""

import jax
import jax.numpy as jnp
from jax import lax

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import log_ratio


_FLAT = 60.0  # nats; e^60 is finite in float32, and the sigmoid is 1 there for any sane temperature


def sapo(positive: ScalarLike = 1.0, negative: ScalarLike = 1.05) -> Term:
    r"""Surrogate whose gradient fades smoothly as the ratio leaves 1, on both sides.

    The value of a token is $-A\,\frac4\tau\,\sigma(\tau(\rho - 1))$ with $\tau$ = `positive` where
    $A > 0$, else `negative`. At $\rho = 1$ the slope in $\rho$ is exactly 1 and the value
    $-2A/\tau$: so the logged `loss/policy` is about twice that of `clipped`, and with two
    temperatures it is not 0 after a baseline. The gradient is $-A\,4\sigma(1-\sigma)\rho\,
    \nabla\log\pi$. Log-ratios above 60 nats, where it is 0, count as 60, so that nothing overflows.

    Differs between libraries: verl fixes `sequence_mean()`, TRL `sequence_mean(count_empty=True)`,
    AReaL uses `token_mean()`; here the weighting is the algorithm's.

    Args:
        positive: temperature where the advantage is above 0; above 0, the larger the narrower.
        negative: temperature elsewhere; above 0. The paper's is larger than `positive`, because
            lowering one token's probability raises many others.

    Returns:
        A term with metrics `loss/policy` and `policy/weight` (token mean of what multiplies
        $-A\,\nabla\log\pi$).

    Source: Gao et al. 2025 (SAPO, arXiv:2511.20347).
    """
    check_number("positive", positive, above=0)
    check_number("negative", negative, above=0)
    return term(_sapo, builder=sapo, positive=positive, negative=negative)


def _sapo(
    scores: Scores, batch: Batch, *, positive: ScalarLike, negative: ScalarLike
) -> tuple[PerToken, Metrics]:
    advantage = batch.advantages
    # Backwards, an infinite ratio would be 0 * inf.
    rho = jnp.exp(jnp.minimum(log_ratio(scores, batch), _FLAT))
    tau = jnp.where(advantage > 0, positive, negative).astype(rho.dtype)
    gate = jax.nn.sigmoid(tau * (rho - 1))
    value = -advantage * (4 / tau) * gate
    weight = lax.stop_gradient(4 * gate * (1 - gate) * rho)
    return value, {"loss/policy": weighted(value, batch), "policy/weight": batch.mean(weight)}
