"""MaxRL's advantage: the centred score relative to the group's mean score."""

import jax.numpy as jnp

from .._masked import group_sum, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._statistics import centre_groups, refuse_singletons


def max_rl() -> Stateless:
    r"""Score minus group mean, over group mean.

    $A_i = (r_i - \bar r_g) / \bar r_g$ on every masked token of row $i$, and 0 where
    $\bar r_g \le 0$; $\bar r_g$ is over the live rows of the group, row $i$ included. With 0/1
    rewards this follows the gradient of the *logarithm* of the success rate (to the order that
    n samples allow), so that hard prompts weigh more. A constant group gives exactly 0 in any
    precision, and so does a group of one (refused where the ids are known). Empty rows get 0.

    Made for rewards that are not negative: it does not change when they are scaled, but it does
    when they are shifted, and with rewards of both signs a mean near 0 makes it as large as you
    like.

    Returns:
        A transform from rewards to advantages.

    Source: Tajwar et al. 2026 (MaxRL, arXiv:2602.02710).
    """
    return stateless(_max_rl, builder=max_rl, reads_total=True, spreads=True, min_group=2)


def _max_rl(signal: PerToken, rollout: Rollout) -> PerToken:
    refuse_singletons(rollout, "max_rl()")
    mask, group = rollout.mask, rollout.group
    centred, count = centre_groups(signal, mask, group)
    mean = group_sum(row_total(signal, mask), group) / jnp.maximum(count, 1)
    positive = mean > 0
    relative = centred / jnp.where(positive, mean, jnp.ones_like(mean))
    return spread(jnp.where(positive, relative, jnp.zeros_like(mean)), mask)
