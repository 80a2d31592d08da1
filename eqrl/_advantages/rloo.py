"""The leave-one-out advantage."""

import jax.numpy as jnp

from .._masked import spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._statistics import centre_groups, refuse_singletons


def rloo() -> Stateless:
    r"""Score minus the mean score of the *other* completions of the same prompt.

    $A_i = r_i - \frac{1}{n-1}\sum_{j \ne i} r_j = \frac{n}{n-1}(r_i - \bar r_g)$ on every masked
    token of row $i$; $n$ counts the live rows of the group. The baseline does not depend on the
    row it serves, so the gradient stays unbiased. A constant group gives exactly 0 in any
    precision, and so does a group of one (refused where the ids are known; verl's loop gives the
    raw reward there, its vectorised form 0). Empty rows enter no statistic and get 0.

    Returns:
        A transform from rewards to advantages.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019.
    """
    return stateless(_rloo, builder=rloo, reads_total=True, spreads=True, min_group=2)


def _rloo(signal: PerToken, rollout: Rollout) -> PerToken:
    refuse_singletons(rollout, "rloo()")
    centred, count = centre_groups(signal, rollout.mask, rollout.group)
    return spread(centred * (count / jnp.maximum(count - 1, 1)), rollout.mask)
