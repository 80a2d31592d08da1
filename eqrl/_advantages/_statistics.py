"""What the baselines share: centring that is exact for equal scores, and safe deviations."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .._masked import group_first, group_sum, live_rows, row_total
from .._types import Mask, PerRow, PerToken, Rollout, ScalarLike


def refuse_singletons(rollout: Rollout, name: str) -> None:
    """Refuses a live row that is alone in its group, where the group ids are known.

    Under `jit` they are not: there such a row gets an advantage of exactly 0, and a training
    script refuses it before the run with `check_groups`.

    Raises:
        ValueError: naming the transform and the group.
    """
    group, mask = rollout.group, rollout.mask
    if isinstance(group, Tracer) or isinstance(mask, Tracer):
        return
    ids = np.asarray(group)
    alone = np.bincount(ids, minlength=1)[ids] == 1
    alone &= np.asarray(mask).any(axis=1)
    if alone.any():
        raise ValueError(
            f"`{name}` compares completions of one prompt, but group {ids[alone][0]} of "
            "`rollout.group` has only one; sample at least 2 completions per prompt, or use "
            "`batch_center()`"
        )


def centre_groups(
    signal: PerToken, mask: Mask, group: Int[Array, " batch"]
) -> tuple[PerRow, Float[Array, " batch"]]:
    """Each live row's total minus its group's mean total, and the group's number of live rows.

    Totals are first taken relative to the group's first live row: a mean of equal floats need
    not equal them, and dividing that rounding error by its own deviation gives advantages of
    order one. Empty rows get 0 and count nowhere.
    """
    live = live_rows(mask)
    total = row_total(signal, mask)
    relative = jnp.where(live, total - group_first(total, live, group), jnp.zeros_like(total))
    count = group_sum(live.astype(signal.dtype), group)
    mean = group_sum(relative, group) / jnp.maximum(count, 1)
    return jnp.where(live, relative - mean, jnp.zeros_like(total)), count


def centre(
    x: Float[Array, " n"], live: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Live entries of `x` minus their mean, 0 elsewhere, and their number.

    Exactly 0 when all live entries are equal, for the reason given in `centre_groups`.
    """
    zero = jnp.zeros((), x.dtype)
    safe = jnp.where(live, x, zero)
    relative = jnp.where(live, safe - safe[jnp.argmax(live)], zero)
    count = jnp.sum(live.astype(x.dtype))
    mean = jnp.sum(relative) / jnp.maximum(count, 1)
    return jnp.where(live, relative - mean, zero), count


def variance(
    squares: Float[Array, "*shape"], count: Float[Array, "*shape"], ddof: ScalarLike
) -> Float[Array, "*shape"]:
    """`squares / (count - ddof)`; 0 where there are no more than `ddof` entries."""
    freedom = count - ddof
    return jnp.where(freedom > 0, squares / jnp.where(freedom > 0, freedom, 1), 0 * squares)


def over_deviation(centred: PerRow, variance: Float[Array, "*any"], eps: ScalarLike) -> PerRow:
    """`centred / (sqrt(variance) + eps)`; 0 where the variance is 0, also for `eps = 0`."""
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, jnp.ones_like(variance)))
    return jnp.where(varies, centred / (deviation + eps), jnp.zeros_like(centred))
