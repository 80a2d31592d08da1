"""Rows without holes: the tokens of each row moved together, and the batch cut to what is used."""

import jax
import jax.numpy as jnp
import numpy as np

from ._prompts import bucket
from ._types import Rollout


def compact(rollout: Rollout, *, step: int = 64) -> Rollout:
    """The same rollout with each row's padding moved to its end, in the smallest bucket of columns.

    A sampler leaves holes (prompts padded to a bucket, completions of unequal length). Scores,
    losses and gradients do not depend on where the holes are; their cost does.

    Args:
        rollout: any layout; the order of a row's tokens is kept.
        step: the new width is a multiple of this, so that few programs are compiled.

    Returns:
        A rollout whose `"batch time"` arrays have the new width.
    """
    used = int(np.max(np.sum(np.asarray(rollout.positions) >= 0, axis=1), initial=1))
    width = min(bucket(used, step), max(rollout.tokens.shape[1], used))
    return _compact(rollout, width)


@jax.jit(static_argnums=1)
def _compact(rollout: Rollout, width: int) -> Rollout:
    shape = rollout.tokens.shape
    order = jnp.argsort(rollout.positions < 0, axis=1, stable=True)[:, :width]

    def gather(x):
        return jnp.take_along_axis(x, order, axis=1) if x.shape == shape else x

    return jax.tree.map(gather, rollout)


def pad_rows(rollout: Rollout, rows: int) -> Rollout:
    """Adds empty rows up to `rows`: no mask, no position, a group each. They train nothing."""
    missing = rows - rollout.tokens.shape[0]
    if missing == 0:
        return rollout
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), rollout)
    empty = jnp.arange(rows) >= rows - missing
    positions = jnp.where(empty[:, None], -1, padded.positions)
    group = jnp.where(empty, jnp.arange(rows, dtype=padded.group.dtype), padded.group)
    return Rollout(
        **{
            **{name: getattr(padded, name) for name in Rollout.__dataclass_fields__},
            "positions": positions,
            "group": group,
        }
    )
