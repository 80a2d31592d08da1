"""Selections: which completions train.

A selection reads a rollout and says which rows to keep. `a & b` keeps what b keeps of what a
keeps. Where it stands decides what dropped rows still count in:

- As `Algorithm.selection` it acts *before* everything: `apply` switches off the mask of dropped
  rows, so they enter no group mean, no whitening, no weight and no denominator.
- As a factor, `drop_truncated() * clipped()`, it acts *after* everything: dropped rows have taken
  part in every statistic and in the denominator, and give this term nothing.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool

from .._lifted import Lifted, lift
from .._types import Rollout


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
    """Keeps what both selections keep; the right one judges what the left one has kept.

    So `drop_truncated() & drop_constant_groups()` drops groups that are constant without their
    truncated rows.
    """

    left: AbstractSelection
    right: AbstractSelection

    def __call__(self, rollout):
        kept = self.left(rollout)
        return kept & self.right(apply(rollout, kept))

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


def apply(rollout: Rollout, keep: Bool[Array, " batch"]) -> Rollout:
    """The rollout with the mask switched off in rows not kept; shapes stay."""
    return dataclasses.replace(rollout, mask=rollout.mask & keep[:, None])
