"""Dynamic sampling: sample again until enough groups teach something."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._pack import pad_rows
from ._types import Rollout


def refill(
    sample: Callable[[int], Rollout],
    select: Callable[[Rollout], jax.Array],
    groups: int,
    *,
    rounds: int,
) -> tuple[Rollout, dict[str, float]]:
    """Samples rounds of prompts until `groups` groups survive `select`.

    DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476): groups that carry no signal are
    replaced by groups that do, instead of shrinking the batch. Which groups survive is decided on
    the rollout as sampled, hence on raw rewards.

    Args:
        sample: `round -> rollout` with rewards, of new prompts each round; every group has the
            same number of rows, and every round the same shapes.
        select: `rollout -> keep[batch]`, for instance `drop_constant_groups()`. A group none of
            whose rows is kept is replaced; of the others all rows stay, for the algorithm's own
            selection to switch off.
        groups: how many live groups make a batch.
        rounds: further rounds after the first, at most.

    Returns:
        A rollout of exactly `groups` groups (empty rows stand for groups that could not be
        found), and metrics: rounds used, share of groups dropped, live groups.
    """
    kept, live, seen = [], 0, 0
    for round in range(rounds + 1):
        rollout = sample(round)
        rows, count = _live_rows(rollout, np.asarray(select(rollout)))
        kept.append(jax.tree.map(lambda x, rows=rows: x[rows], rollout))
        live, seen = live + count, seen + len(np.unique(np.asarray(rollout.group)))
        size = rollout.tokens.shape[0] * groups // len(np.unique(np.asarray(rollout.group)))
        if live >= groups:
            break
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:size], *kept)
    if joined.tokens.shape[0]:
        joined = pad_rows(joined, size)
    else:  # nothing alive at all: the last round, with nothing to learn from it
        joined = eqx.tree_at(lambda r: r.mask, rollout, jnp.zeros_like(rollout.mask))
    per_group = size // groups
    group = jnp.arange(size, dtype=joined.group.dtype) // per_group * per_group
    return eqx.tree_at(lambda r: r.group, joined, group), {
        "select/rounds": float(round + 1),
        "select/dropped_frac": 1 - live / seen,
        "select/live_groups": float(min(live, groups)),
    }


def _live_rows(rollout: Rollout, keep: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of the groups of which something was kept, and how many groups these are."""
    group = np.asarray(rollout.group)
    alive = np.isin(group, group[keep])
    rows = np.flatnonzero(alive)
    return rows[np.argsort(group[rows], kind="stable")], len(np.unique(group[alive]))
