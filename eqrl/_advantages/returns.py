"""Discounted return-to-go."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import backward_sum


def returns(gamma: ScalarLike = 1.0) -> Stateless:
    r"""Reward-to-go of every trained token.

    $G_t = R_t + \gamma G_{t'}$, where $t'$ is the row's next *masked* token: across a gap in the
    mask (tool output) the return is carried over and the discount is not applied. Nothing is
    bootstrapped after the last token, truncated rows included. Unmasked positions get 0.

    Differs between libraries: verl carries across gaps as here; OpenRLHF discounts every column
    of a gap. Equal at `gamma = 1`.

    Args:
        gamma: discount per trained token, from 0 to 1.

    Returns:
        A transform from per-token rewards to returns.

    Source: Hu et al. 2025 (REINFORCE++, arXiv:2501.03262).
    """
    check_number("gamma", gamma, least=0, most=1)
    return stateless(_returns, builder=returns, reads_total=True, spreads=True, gamma=gamma)


def _returns(signal: PerToken, rollout: Rollout, *, gamma: ScalarLike) -> PerToken:
    mask = rollout.mask
    decay = jnp.where(mask, jnp.asarray(gamma, signal.dtype), jnp.ones((), signal.dtype))
    return zero_unmasked(backward_sum(zero_unmasked(signal, mask), decay), mask)
