"""Multiply the signal."""

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def scale(factor: ScalarLike) -> Stateless:
    """Multiplies every token's signal, hence also a row's total, by `factor`.

    `a | scale(0.5)` equals `0.5 * a`; at the head of a chain it scales the reward. Unmasked
    positions get 0.

    Args:
        factor: any finite number.

    Returns:
        A transform of any per-token signal.
    """
    check_number("factor", factor)
    return stateless(_scale, builder=scale, factor=factor)


def _scale(signal: PerToken, rollout: Rollout, *, factor: ScalarLike) -> PerToken:
    return factor * zero_unmasked(signal, rollout.mask)
