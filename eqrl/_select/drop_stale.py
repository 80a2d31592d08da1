"""Completions that an old policy sampled."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._checks import check_number
from .._masked import live_rows
from .._types import Rollout, ScalarLike
from .base import Selection, selection


def drop_stale(max_age: ScalarLike) -> Selection:
    """Drops completions sampled more than `max_age` updates before the batch's newest one.

    A row's age is the largest `rollout.version` among live rows minus its own: a batch from one
    policy has age 0 throughout. For rollouts that overlap training, where one batch mixes
    completions of several policies.

    Args:
        max_age: in updates, not negative.

    Returns:
        A selection that reads `rollout.version`.

    Source: the staleness bound of Fu et al. 2025 (AReaL, arXiv:2505.24298).
    """
    check_number("max_age", max_age, least=0)
    return selection(_drop_stale, builder=drop_stale, max_age=max_age)


def _drop_stale(rollout: Rollout, *, max_age: ScalarLike) -> Bool[Array, " batch"]:
    version, live = rollout.need("version"), live_rows(rollout.mask)
    newest = jnp.max(jnp.where(live, version, jnp.iinfo(version.dtype).min))
    return live & ((newest - version).astype(jnp.result_type(float)) <= max_age)
