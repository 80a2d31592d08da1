"""GRPO's advantage: standardise each completion's score within its group."""

import jax.numpy as jnp

from .._checks import check_choice, check_number
from .._masked import group_sum, live_rows, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerRow, PerToken, Rollout, ScalarLike
from ._statistics import (
    centre,
    centre_groups,
    leave_one_out,
    over_deviation,
    refuse_singletons,
    variance,
)


DEVIATIONS = ("group", "batch", "others")


def group_norm(
    *, ddof: ScalarLike = 1, eps: ScalarLike = 1e-6, deviation: str = "group"
) -> Stateless:
    r"""Group-relative advantage.

    $A_i = (r_i - b_i) / (s_i + eps)$ on every masked token of row $i$, where $r_i$ is the row's
    total; `eps` stands outside the root. `deviation` says whose mean and standard deviation:

    - `"group"`: $b$ and $s$ are mean and standard deviation over the live rows of the row's
      group, the row itself included.
    - `"batch"`: $b$ is the group's mean, $s$ the standard deviation of the raw totals (not of
      the centred ones) over the live rows of the whole batch.
    - `"others"`: $b_i$ and $s_i$ are mean and standard deviation over the *other* live rows of
      the group. Where these are all equal ($s_i = 0$), or no more than `ddof`, the advantage is
      $r_i - b_i$, not normalised; so groups of 2 always are not.

    A constant group gives exactly 0 in any precision, whatever `deviation` is, and so does a
    group of one (refused where the ids are known). Empty rows enter no statistic.

    Differs between libraries: `eps` is 1e-6 in verl and slime, 1e-4 in TRL, 1e-9 in OpenRLHF;
    all of them divide by n - 1. `"batch"` is TRL's `scale_rewards="batch"`. `"others"` is NeMo's
    "grpo" (eps 1e-6); prime-rl's has no deviation (here: `group_center()`).

    Args:
        ddof: 1 divides the squares by n - 1, 0 by n, where n counts the rows of the deviation.
        eps: added to the standard deviation, not negative.
        deviation: `"group"`, `"batch"` or `"others"`.

    Returns:
        A transform from rewards to advantages.

    Source: Shao et al. 2024 (arXiv:2402.03300); `"batch"`: Liu et al. 2025 (Lite PPO,
    arXiv:2508.08221).
    """
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    check_choice("deviation", deviation, DEVIATIONS)
    return stateless(
        _group_norm,
        builder=group_norm,
        reads_total=True,
        spreads=True,
        min_group=2,
        ddof=ddof,
        eps=eps,
        deviation=deviation,
    )


def _group_norm(
    signal: PerToken, rollout: Rollout, *, ddof: ScalarLike, eps: ScalarLike, deviation: str
) -> PerToken:
    refuse_singletons(rollout, "group_norm()")
    mask, group = rollout.mask, rollout.group
    if deviation == "others":
        return spread(_against_others(signal, rollout, ddof, eps), mask)
    centred, count = centre_groups(signal, mask, group)
    if deviation == "batch":
        everyone, everyones_count = centre(row_total(signal, mask), live_rows(mask))
        power = variance(jnp.sum(everyone**2), everyones_count, ddof)
    else:
        power = variance(group_sum(centred**2, group), count, ddof)
    return spread(over_deviation(centred, power, eps), mask)


def _against_others(
    signal: PerToken, rollout: Rollout, ddof: ScalarLike, eps: ScalarLike
) -> PerRow:
    mask = rollout.mask
    others = leave_one_out(row_total(signal, mask), live_rows(mask), rollout.group)
    centred, squares, count = others
    power = variance(squares, count, ddof)
    return jnp.where(power > 0, over_deviation(centred, power, eps), centred)
