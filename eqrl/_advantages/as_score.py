"""From an advantage back to a score."""

from .._masked import last_token, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout


def as_score() -> Stateless:
    r"""Puts each row's value back on its last masked token, and 0 on the others.

    For a signal that a baseline has repeated over the tokens of a row: what reads totals may
    follow again. `rloo() | as_score() | batch_norm()` standardises leave-one-out advantages over
    completions (`whiten()` would over tokens); `group_center() | as_score() | kl_penalty(0.01) |
    returns()` lets a token bear the KL of the tokens after it, as OpenRLHF does. The value taken is
    that of the row's last masked token; where tokens differ, the others are lost. Empty rows give
    0.

    Returns:
        A transform from advantages to scores.
    """
    return stateless(_as_score, builder=as_score, gathers=True)


def _as_score(signal: PerToken, rollout: Rollout) -> PerToken:
    return zero_unmasked(signal, last_token(rollout.mask))
