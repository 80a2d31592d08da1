"""ReMax's advantage: the return minus what the greedy completion scored."""

import jax.numpy as jnp

from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._recurrence import backward_sum


def remax() -> Stateless:
    r"""Undiscounted return-to-go minus the reward of a greedy completion of the same prompt.

    $A_t = \sum_{s \ge t} R_s - r_{greedy}$, $s$ over the row's masked tokens: across a gap in the
    mask the return is carried over. $r_{greedy}$ is `rollout.greedy_rewards`, one number a row;
    it must be in the units of the signal, and no transform before this one changes it. No other
    row enters, so groups of one are legal and equal scores do not give 0. Unmasked positions and
    empty rows get 0.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.greedy_rewards`.

    Source: Li et al. 2023 (ReMax, arXiv:2310.10505).
    """
    return stateless(
        _remax, builder=remax, requires=("greedy_rewards",), reads_total=True, spreads=True
    )


def _remax(signal: PerToken, rollout: Rollout) -> PerToken:
    mask = rollout.mask
    togo = backward_sum(zero_unmasked(signal, mask), jnp.ones_like(signal))
    greedy = rollout.need("greedy_rewards").astype(signal.dtype)
    return zero_unmasked(togo - greedy[:, None], mask)
