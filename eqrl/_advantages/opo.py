"""OPO's advantage: a group baseline that weighs completions by their length."""

import jax.numpy as jnp

from .._masked import group_sum, live_rows, row_length, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._statistics import refuse_singletons, relative_to_first


def opo() -> Stateless:
    r"""Score minus the length-weighted mean score of the group.

    $A_i = r_i - \frac{\sum_j L_j r_j}{\sum_j L_j}$ on every masked token of row $i$; $j$ runs over
    the live rows of the group, row $i$ included, and $L$ is a row's number of masked tokens. This
    is the baseline of least variance if a completion's squared gradient grows with its length;
    $\sum_j L_j A_j = 0$ in each group, so the advantages of its *tokens* sum to zero. A constant
    group gives exactly 0 in any precision, and so does a group of one (refused where the ids are
    known). Empty rows get 0.

    Meant for exactly on-policy data, without a KL term.

    Returns:
        A transform from rewards to advantages.

    Source: Hao et al. 2025 (OPO, arXiv:2505.23585).
    """
    return stateless(_opo, builder=opo, reads_total=True, spreads=True, min_group=2)


def _opo(signal: PerToken, rollout: Rollout) -> PerToken:
    refuse_singletons(rollout, "opo()")
    mask, group = rollout.mask, rollout.group
    relative = relative_to_first(row_total(signal, mask), live_rows(mask), group)
    length = row_length(mask).astype(signal.dtype)
    baseline = group_sum(length * relative, group) / jnp.maximum(group_sum(length, group), 1)
    return spread(relative - baseline, mask)
