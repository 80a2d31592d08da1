"""Kimi's reward for being short among the completions of one prompt."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import live_rows, on_last, row_length, row_total, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from .length_cost import group_max


def length_reward(coef: ScalarLike, *, threshold: ScalarLike = 0.0) -> Stateless:
    r"""Rewards short completions that are right and punishes long ones.

    With $\lambda_i = 0.5 - (L_i - \min_g L) / (\max_g L - \min_g L)$, $L$ the number of masked
    tokens (stop token included, gaps not) and minimum and maximum over the group's live rows, the
    reward on the last masked token of row $i$ changes by $coef \cdot \lambda_i$ if the row's total
    is above `threshold`, and by $coef \cdot \min(0, \lambda_i)$ if it is not: a wrong completion
    gains nothing by being short. Where all lengths of a group are equal, and for its only live
    row, nothing changes. Empty rows enter no statistic and stay 0; truncated rows count like
    others.

    Totals are read as they stand in the chain: put it before shaping that moves them across
    `threshold`. The paper introduces it gradually, after training without it.

    Differs between libraries: open-r1 counts characters instead of tokens.

    Args:
        coef: weight; the change spans `coef` from the shortest to the longest. Not negative.
        threshold: a completion is right if its total is above this.

    Returns:
        A transform from rewards to rewards; it must stand before the signal is spread.

    Source: Kimi Team 2025 (Kimi k1.5, arXiv:2501.12599).
    """
    check_number("coef", coef, least=0)
    check_number("threshold", threshold)
    return stateless(
        _length_reward,
        builder=length_reward,
        reads_total=True,
        min_group=2,
        coef=coef,
        threshold=threshold,
    )


def _length_reward(
    signal: PerToken, rollout: Rollout, *, coef: ScalarLike, threshold: ScalarLike
) -> PerToken:
    mask, group, live = rollout.mask, rollout.group, live_rows(rollout.mask)
    length = row_length(mask).astype(signal.dtype)
    longest = group_max(length, group)
    shortest = -group_max(jnp.where(live, -length, -longest), group)
    width = longest - shortest
    lam = jnp.where(width > 0, 0.5 - (length - shortest) / jnp.maximum(width, 1), 0 * width)
    right = row_total(signal, mask) > threshold
    change = coef * jnp.where(right, lam, jnp.minimum(lam, 0))
    return zero_unmasked(signal, mask) + on_last(change, mask)
