"""Return-to-go over the turns of a conversation."""

from .._checks import check_number
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import discounted_sum
from ._turns import over_turn, turn_starts, turn_total


def turn_returns(gamma: ScalarLike = 1.0) -> Stateless:
    r"""Reward-to-go of every turn, on each of its tokens.

    A turn is a maximal run of consecutive masked tokens: what the policy wrote between two pieces
    of tool output. $G_k = R_k + \gamma G_{k+1}$ with $R_k$ the sum of the rewards on the tokens of
    turn $k$; every token of the turn gets $G_k$. Discounting is per turn, whatever the lengths of
    turns and gaps. A row of one turn gets its total on every token, for any `gamma`. Nothing is
    bootstrapped after the last turn, truncated rows included. Unmasked positions and empty rows
    get 0.

    Against `returns(gamma)` a token also sees the rewards of its own turn that came before it.

    Args:
        gamma: discount per turn, from 0 to 1.

    Returns:
        A transform from per-token rewards to returns; also the value target beside `turn_gae`.

    Source: Baronio et al. 2025 (Kevin, arXiv:2507.11948), which discounts by 0.4 per turn.
    """
    check_number("gamma", gamma, least=0, most=1)
    return stateless(
        _turn_returns, builder=turn_returns, reads_total=True, spreads=True, gamma=gamma
    )


def _turn_returns(signal: PerToken, rollout: Rollout, *, gamma: ScalarLike) -> PerToken:
    mask = rollout.mask
    togo = discounted_sum(turn_total(signal, mask), turn_starts(mask), gamma)
    return over_turn(togo, mask)
