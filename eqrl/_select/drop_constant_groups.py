"""Dynamic sampling's filter: groups that teach nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._checks import check_number
from .._masked import live_rows
from .._types import Rollout, ScalarLike
from .base import Selection, selection


def drop_constant_groups(*, tolerance: ScalarLike = 0.0) -> Selection:
    """Drops groups whose completions all earned the same: they carry no gradient.

    A group is constant when *every* raw reward component (a column of `rollout.rewards`) has a
    range (largest minus smallest value over the group's live rows) of at most `tolerance`; so
    shaping and weights decide nothing. Groups of one live row are constant. Empty rows are never
    kept, and what they earned decides nothing.

    Differs between libraries: verl compares one metric of choice, NeMo the deviation of the raw
    reward, slime a deviation above 1e-6; OpenRLHF's filter is `drop_extreme_groups`.

    Args:
        tolerance: the range that still counts as constant, not negative.

    Returns:
        A selection that reads `rollout.rewards`.

    Source: the dynamic sampling of Yu et al. 2025 (DAPO, arXiv:2503.14476).
    """
    check_number("tolerance", tolerance, least=0)
    return selection(_drop_constant_groups, builder=drop_constant_groups, tolerance=tolerance)


def _drop_constant_groups(rollout: Rollout, *, tolerance: ScalarLike) -> Bool[Array, " batch"]:
    rewards, live, group = rollout.need("rewards"), live_rows(rollout.mask), rollout.group
    rows = live.shape[0]
    bound = lambda of, missing: of(  # noqa: E731
        jnp.where(live[:, None], rewards, missing), group, num_segments=rows
    )
    width = bound(jax.ops.segment_max, -jnp.inf) - bound(jax.ops.segment_min, jnp.inf)
    return live & jnp.any(width > tolerance, axis=1)[group]
