"""GDPO: standardise each reward component within its group before they are added."""

import jax

from .._checks import check_choice, check_number
from .._masked import group_sum, live_rows, on_last
from .._transform import Stateless, stateless
from .._types import PerRow, PerToken, Rollout, ScalarLike
from ._statistics import centre_within, over_deviation, refuse_singletons, variance


def gdpo(*weights: ScalarLike, ddof: ScalarLike = 1, eps: ScalarLike = 1e-6) -> Stateless:
    r"""A weighted sum of reward components, each standardised within its group.

    $R_i = \sum_k w_k (r^k_i - \bar r^k_g) / (s^k_g + eps)$ on the *last* masked token of row $i$,
    with $r^k$ column $k$ of `rollout.rewards`, and mean and standard deviation over the live rows
    of the group; `eps` stands outside the root. The signal that comes in is discarded. A
    component that is constant in a group adds exactly 0 there in any precision, and so does any
    in a group of one (refused where the ids are known). Empty rows get 0.

    The result is still a score: the paper normalises the sum once more over the batch, and there
    the libraries differ. TRL's `normalize_then_sum` is
    `gdpo(1.0, 0.5, eps=1e-4) | batch_norm(eps=1e-4)`: over completions. verl's is
    `gdpo(1.0, 0.5) | returns() | whiten()`: over tokens, so that long completions weigh more.
    NeMo subtracts the mean of the other rows instead, without a deviation:
    `(component(0) | rloo()) + 0.5 * (component(1) | rloo())` before its division by the batch's.

    Args:
        *weights: one number a component; none at all stands for 1 each.
        ddof: 1 divides the squares by n - 1, 0 by n.
        eps: added to the standard deviation, not negative.

    Returns:
        A transform that stands first in its chain; reads `rollout.rewards`.

    Raises:
        ValueError: when called, if there are not as many weights as components.

    Source: Liu et al. 2026 (GDPO, arXiv:2601.05242).
    """
    for place, weight in enumerate(weights):
        check_number(f"weights[{place}]", weight)
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    return stateless(
        _gdpo, builder=gdpo, starts=True, min_group=2, weights=weights, ddof=ddof, eps=eps
    )


def _gdpo(
    signal: PerToken,
    rollout: Rollout,
    *,
    weights: tuple[ScalarLike, ...],
    ddof: ScalarLike,
    eps: ScalarLike,
) -> PerToken:
    refuse_singletons(rollout, "gdpo()")
    rewards = rollout.need("rewards").astype(signal.dtype)
    count = rewards.shape[1]
    weights = weights or (1,) * count
    if len(weights) != count:
        raise ValueError(
            f"`gdpo` got {len(weights)} weights but `rollout.rewards` has {count} components; "
            "pass one weight a component, or none for 1 each"
        )
    live, group = live_rows(rollout.mask), rollout.group

    def standardise(row: PerRow) -> PerRow:
        centred, size = centre_within(row, live, group)
        return over_deviation(centred, variance(group_sum(centred**2, group), size, ddof), eps)

    each = jax.vmap(standardise, in_axes=1)(rewards)
    total = sum((weight * one for weight, one in zip(weights, each, strict=True)), 0 * each[0])
    return on_last(total, rollout.mask)
