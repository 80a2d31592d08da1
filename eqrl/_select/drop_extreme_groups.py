"""Groups that are too easy or too hard."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._checks import check_number
from .._masked import group_first, group_sum, live_rows
from .._types import Rollout, ScalarLike
from .base import Selection, selection


def drop_extreme_groups(
    low: ScalarLike = 0.0, high: ScalarLike = 1.0, *, component: ScalarLike = 0
) -> Selection:
    """Keeps groups whose mean raw reward lies strictly between `low` and `high`.

    The mean is that of one reward component over the group's live rows, by convention correctness.
    With 0/1 rewards and the defaults this equals `drop_constant_groups`; with shaped rewards it
    does not: a group of equal middling rewards is kept, though it carries no gradient.

    Differs between libraries: this is OpenRLHF's dynamic filtering.

    Args:
        low: the mean must be above this.
        high: the mean must be below this; above `low`.
        component: which column of `rollout.rewards`.

    Returns:
        A selection that reads `rollout.rewards`.
    """
    check_number("low", low)
    check_number("high", high)
    if isinstance(low, int | float) and isinstance(high, int | float):
        check_number("high", high, above=low)
    check_number("component", component, least=0)
    return selection(
        _drop_extreme_groups,
        builder=drop_extreme_groups,
        low=low,
        high=high,
        component=component,
    )


def _drop_extreme_groups(
    rollout: Rollout, *, low: ScalarLike, high: ScalarLike, component: ScalarLike
) -> Bool[Array, " batch"]:
    rewards, live, group = rollout.need("rewards"), live_rows(rollout.mask), rollout.group
    if isinstance(component, int) and component >= rewards.shape[1]:
        raise ValueError(
            f"component={component} but `rollout.rewards` has {rewards.shape[1]}; count from 0"
        )
    # Relative to the group's first live row, so that the mean of equal rewards is that reward.
    column = jnp.where(live, jnp.take(rewards, component, axis=1), 0)
    first = group_first(column, live, group)
    count = jnp.maximum(group_sum(live.astype(column.dtype), group), 1)
    mean = first + group_sum(jnp.where(live, column - first, 0), group) / count
    return live & (low < mean) & (mean < high)
