"""The importance-weighted surrogate, without any bound."""

import jax.numpy as jnp

from .._types import Batch, Metrics, PerToken, Scores
from .base import Term, term, weighted
from .ratio import Ratio, check_ratio, log_ratio


def unclipped(*, ratio: Ratio | None = None) -> Term:
    r"""$-A\rho$: the policy gradient off policy, corrected by the ratio alone.

    With $\rho = e^{\log\pi - \log\pi_{old}}$ the gradient is $-A\rho\,\nabla\log\pi$. Nothing keeps
    the policy near the one that sampled, so a mask or a penalty has to:
    `m2po(0.04) * unclipped()`, `unclipped() + 0.1 * squared_ratio()`. Masked positions give 0 and
    are masked before the exponential. On the first update it equals `clipped()` and `reinforce()`
    in gradient.

    Args:
        ratio: `token_ratio()` by default.

    Returns:
        A term with metric `loss/policy`.

    Source: Kakade and Langford 2002, as named in Schulman et al. 2017 (arXiv:1707.06347), eq. 6.
    """
    check_ratio(ratio)
    return term(_unclipped, builder=unclipped, ratio=ratio)


def _unclipped(scores: Scores, batch: Batch, *, ratio: Ratio | None) -> tuple[PerToken, Metrics]:
    delta, advantage = (ratio or log_ratio)(scores, batch), batch.advantages
    # Without an advantage an overflow of the exponential would be 0 * inf.
    value = -advantage * jnp.exp(jnp.where(advantage == 0, jnp.zeros_like(delta), delta))
    return value, {"loss/policy": weighted(value, batch)}
