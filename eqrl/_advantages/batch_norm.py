"""Standardise each completion's score within the batch."""

import jax.numpy as jnp

from .._checks import check_choice, check_number
from .._masked import live_rows, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre, over_deviation, variance


def batch_norm(*, ddof: ScalarLike = 1, eps: ScalarLike = 1e-8) -> Stateless:
    r"""Score minus batch mean, over batch deviation.

    $A_i = (r_i - \bar r) / (s + eps)$ on every masked token of row $i$. The population is the
    live rows of the whole batch, each counted once (`whiten` counts tokens instead, so that long
    completions weigh more); `eps` stands outside the root. A constant batch and a batch of one
    live row give exactly 0. Empty rows get 0.

    Differs between libraries: TRL's RLOO normalises so with `eps` 1e-4.

    Args:
        ddof: 1 divides the squares by n - 1, 0 by n.
        eps: added to the standard deviation, not negative.

    Returns:
        A transform from rewards to advantages.
    """
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    return stateless(
        _batch_norm, builder=batch_norm, reads_total=True, spreads=True, ddof=ddof, eps=eps
    )


def _batch_norm(
    signal: PerToken, rollout: Rollout, *, ddof: ScalarLike, eps: ScalarLike
) -> PerToken:
    mask = rollout.mask
    centred, count = centre(row_total(signal, mask), live_rows(mask))
    return spread(over_deviation(centred, variance(jnp.sum(centred**2), count, ddof), eps), mask)
