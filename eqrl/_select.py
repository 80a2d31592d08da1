"""Selections: which completions train.

A selection reads a rollout and says which rows to keep; `apply` switches off the mask of the
others, and every weight and statistic follows from the mask. `a & b` keeps what both keep.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ._lifted import Lifted, lift
from ._masked import group_first, live_rows
from ._types import Rollout


class AbstractSelection(eqx.Module):
    """A rule for which rows of a rollout train."""

    @abc.abstractmethod
    def __call__(self, rollout: Rollout) -> Bool[Array, " batch"]:
        """True for each row to keep."""

    def __and__(self, other: "AbstractSelection") -> "Both":
        if not isinstance(other, AbstractSelection):
            return NotImplemented
        return Both(self, other)


class Both(AbstractSelection):
    """Keeps what both selections keep."""

    left: AbstractSelection
    right: AbstractSelection

    def __call__(self, rollout):
        return self.left(rollout) & self.right(rollout)

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Both) else repr(self.right)
        return f"{self.left!r} & {right}"


class Selection(AbstractSelection):
    """A function `(rollout, **hyperparameters) -> keep`; prints as the call that builds it."""

    lifted: Lifted

    def __call__(self, rollout):
        return self.lifted(rollout)

    def __repr__(self) -> str:
        return repr(self.lifted)


def selection(
    fn: Callable[..., Bool[Array, " batch"]],
    *,
    builder: Callable | None = None,
    **hyperparameters: Any,
) -> Selection:
    """Lifts a typed function to a selection.

    Args:
        fn: `(rollout, **hyperparameters) -> keep`.
        builder: the public function that the selection prints as; `fn` itself by default.
        **hyperparameters: passed to `fn` by keyword.

    Returns:
        A selection that combines, prints and compares like the built-in ones.
    """
    return Selection(lift(fn, builder, hyperparameters))


def drop_constant_groups() -> Selection:
    """Drops groups whose completions all earned the same: they carry no gradient.

    A group is constant when *every* raw reward component (a column of `rollout.rewards`) is equal
    over the group's live rows, so shaping and weights decide nothing. Groups of one live row are
    constant. Empty rows are never kept.

    Differs between libraries: verl compares one metric of choice, NeMo the deviation of the raw
    reward; OpenRLHF keeps groups whose mean lies strictly between two bounds, which keeps a group
    of equal middling rewards.

    Source: the dynamic sampling of Yu et al. 2025 (DAPO, arXiv:2503.14476).
    """
    return selection(_drop_constant_groups, builder=drop_constant_groups)


def _drop_constant_groups(rollout: Rollout) -> Bool[Array, " batch"]:
    if rollout.rewards is None:
        raise ValueError(
            "`drop_constant_groups()` reads `rollout.rewards`, which is None; store the raw reward "
            "components there, one column a reward function"
        )
    live, group = live_rows(rollout.mask), rollout.group
    first = jax.vmap(lambda column: group_first(column, live, group), 1, 1)(rollout.rewards)
    differs = jnp.any(rollout.rewards != first, axis=1) & live
    varies = jax.ops.segment_sum(differs.astype(jnp.int32), group, num_segments=group.shape[0])
    return live & (varies[group] > 0)


def drop_truncated() -> Selection:
    """Drops completions that ended without a stop token ("overlong filtering").

    Applied before the advantage, so dropped rows do not enter their group's statistics either
    (TRL's `mask_truncated_completions` lets them).
    """
    return selection(_drop_truncated, builder=drop_truncated)


def _drop_truncated(rollout: Rollout) -> Bool[Array, " batch"]:
    return live_rows(rollout.mask) & ~rollout.truncated


def apply(rollout: Rollout, keep: Bool[Array, " batch"]) -> Rollout:
    """The rollout with the mask switched off in rows not kept; shapes stay."""
    return dataclasses.replace(rollout, mask=rollout.mask & keep[:, None])
