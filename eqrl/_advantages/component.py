"""One raw reward component, as the head of a chain of its own."""

import jax
import jax.numpy as jnp

from .._masked import on_last
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def component(index: ScalarLike) -> Stateless:
    """Begins anew from one raw reward component: column `index` of `rollout.rewards`.

    Each live row's number stands on its last masked token; the signal that comes in, and with it
    every weight and shaping, is discarded. So components can be treated apart and added:
    `(component(0) | group_norm()) + 0.5 * (component(1) | group_norm())`. Empty rows get 0.

    Args:
        index: which component, an integer counted from 0. An array, whose value is not known
            under `jit`, gives NaN on every live row when it is too large.

    Returns:
        A transform that stands first in its chain; reads `rollout.rewards`.

    Raises:
        ValueError: when called, if the rollout has no such component.
    """
    if isinstance(index, jax.Array):
        whole = jnp.issubdtype(index.dtype, jnp.integer)
    else:
        whole = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    if not whole:
        raise ValueError(f"index={index!r} names no component; pass an integer from 0 on")
    return stateless(_component, builder=component, starts=True, index=index)


def _component(signal: PerToken, rollout: Rollout, *, index: ScalarLike) -> PerToken:
    rewards = rollout.need("rewards")
    count = rewards.shape[1]
    if isinstance(index, int) and index >= count:
        raise ValueError(
            f"index={index} is out of range: `rollout.rewards` has {count} components; pass an "
            f"integer below {count} to `component`"
        )
    column = jnp.take(rewards, index, axis=1, mode="fill", fill_value=jnp.nan)
    return on_last(column.astype(signal.dtype), rollout.mask)
