"""GRPO's advantage: standardise each completion's score within its group."""

from .._checks import check_choice, check_number
from .._masked import group_sum, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre_groups, over_deviation, refuse_singletons, variance


def group_norm(*, ddof: ScalarLike = 1, eps: ScalarLike = 1e-6) -> Stateless:
    r"""Group-relative advantage.

    $A_i = (r_i - \bar r_g) / (s_g + eps)$ on every masked token of row $i$, where $r_i$ is the
    row's total, and $\bar r_g$, $s_g$ are mean and standard deviation over the live rows of its
    group; `eps` stands outside the root. A constant group gives exactly 0 in any precision, and
    so does a group of one (refused where the ids are known). Empty rows enter no statistic.

    Differs between libraries: `eps` is 1e-6 in verl and slime, 1e-4 in TRL, 1e-9 in OpenRLHF;
    all of them divide by n - 1. NeMo's "grpo" takes mean and deviation over the *other* rows,
    prime-rl's has no deviation (here: `group_center()`).

    Args:
        ddof: 1 divides the squares by n - 1, 0 by n.
        eps: added to the standard deviation, not negative.

    Returns:
        A transform from rewards to advantages.

    Source: Shao et al. 2024 (arXiv:2402.03300).
    """
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    return stateless(
        _group_norm,
        builder=group_norm,
        reads_total=True,
        spreads=True,
        min_group=2,
        ddof=ddof,
        eps=eps,
    )


def _group_norm(
    signal: PerToken, rollout: Rollout, *, ddof: ScalarLike, eps: ScalarLike
) -> PerToken:
    refuse_singletons(rollout, "group_norm()")
    centred, count = centre_groups(signal, rollout.mask, rollout.group)
    squares = group_sum(centred**2, rollout.group)
    return spread(over_deviation(centred, variance(squares, count, ddof), eps), rollout.mask)
