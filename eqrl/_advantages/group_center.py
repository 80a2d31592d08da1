"""Dr. GRPO's advantage: the score minus its group's mean."""

from .._masked import spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._statistics import centre_groups, refuse_singletons


def group_center() -> Stateless:
    r"""Score minus group mean.

    $A_i = r_i - \bar r_g$ on every masked token of row $i$, the mean taken over the live rows of
    the group, row $i$ included. A constant group gives exactly 0 in any precision, and so does a
    group of one (refused where the ids are known). Empty rows enter no statistic and get 0.

    Differs between libraries: this is `scale_rewards="none"` in TRL,
    `norm_adv_by_std_in_grpo=False` in verl, and what prime-rl calls "grpo". Dr. GRPO is this
    together with a constant denominator of the loss (`constant_length`).

    Returns:
        A transform from rewards to advantages.

    Source: Liu et al. 2025 (arXiv:2503.20783).
    """
    return stateless(
        _group_center, builder=group_center, reads_total=True, spreads=True, min_group=2
    )


def _group_center(signal: PerToken, rollout: Rollout) -> PerToken:
    refuse_singletons(rollout, "group_center()")
    centred, _ = centre_groups(signal, rollout.mask, rollout.group)
    return spread(centred, rollout.mask)
