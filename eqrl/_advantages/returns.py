"""Discounted return-to-go."""

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import GAPS, discounted_sum, steps_of


def returns(gamma: ScalarLike = 1.0, *, gap: str = "carry") -> Stateless:
    r"""Reward-to-go of every trained token.

    $G_t = R_t + \gamma G_{t'}$. With `gap="carry"` $t'$ is the row's next *masked* token: across a
    gap in the mask (tool output) the return is carried over and the discount is not applied. With
    `gap="decay"` $t'$ is the next token of the sequence, masked or not, so a gap of $n$ tokens
    costs another $\gamma^n$. Both are the same without gaps, and at $\gamma = 1$. Padding is never
    stepped on. Nothing is bootstrapped after the last token, truncated rows included. Unmasked
    positions get 0, and so do empty rows.

    Differs between libraries: verl carries across gaps; OpenRLHF discounts every column of one.

    Args:
        gamma: discount per step, from 0 to 1.
        gap: `"carry"` or `"decay"`.

    Returns:
        A transform from per-token rewards to returns.

    Source: Hu et al. 2025 (REINFORCE++, arXiv:2501.03262).
    """
    check_number("gamma", gamma, least=0, most=1)
    check_choice("gap", gap, GAPS)
    return stateless(
        _returns, builder=returns, reads_total=True, spreads=True, gamma=gamma, gap=gap
    )


def _returns(signal: PerToken, rollout: Rollout, *, gamma: ScalarLike, gap: str) -> PerToken:
    mask = rollout.mask
    reward = zero_unmasked(signal, mask)
    return zero_unmasked(discounted_sum(reward, steps_of(rollout, gap), gamma), mask)
