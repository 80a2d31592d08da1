"""Loss terms: `(scores, batch) -> per-token values and metrics`.

A term never reduces. The reduction is `batch.weights`, computed once for all rows of an optimizer
step, and the loss is `sum(weights * value)`; so the gradient cannot depend on how the batch was
split. Metrics are scalars that *add up* over such parts: each is a sum against `batch.weights` or,
through `batch.mean`, against the token mean. `a + b` adds terms, `0.04 * a` scales one, and
`f * a` weighs one by a factor (`factor.py`).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._lifted import Lifted, lift, number
from .._masked import zero_unmasked
from .._select.base import AbstractSelection
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores


class Prepares(eqx.Module):
    """What terms and factors share: work done once per rollout, before it is split.

    A quantile over all tokens, or a coefficient that adapts from rollout to rollout, cannot be
    computed in a micro-batch. `prepare` sees all rows of a rollout, with advantages and weights;
    what it returns is cut along with the rows and read back as `batch.prepared`.

    Attributes:
        requires: names of the optional `Rollout` fields it reads.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def init(self) -> PyTree:
        """The state before the first rollout; `None` without state."""
        return None

    def prepare(self, batch: Batch, state: PyTree) -> tuple[PyTree, PyTree]:
        """Arrays `[batch time]` for `__call__` to read from `batch.prepared`, and the next state.

        Args:
            batch: all rows of a rollout.
            state: from `init` or the previous call.
        """
        del batch
        return None, state


class AbstractTerm(Prepares):
    """One per-token summand of an objective."""

    @abc.abstractmethod
    def __call__(self, scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
        """Per-token values to minimise, zero on unmasked positions, and additive metrics."""

    def __add__(self, other: "AbstractTerm") -> "AddTerms":
        if not isinstance(other, AbstractTerm):
            return NotImplemented
        return AddTerms(self, other)

    def __mul__(self, factor: ScalarLike) -> "ScaledTerm":
        if isinstance(factor, eqx.Module):
            return NotImplemented
        return ScaledTerm(factor, self)

    def __rmul__(self, factor: Any) -> "AbstractTerm":
        if isinstance(factor, AbstractSelection):
            from .factor import FactorTerm, Kept  # they are made of what stands here

            return FactorTerm(Kept(factor), self)
        return self.__mul__(factor)


class Pair(Prepares):
    """Two pieces that prepare side by side."""

    left: Prepares
    right: Prepares

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.requires | self.right.requires

    def init(self) -> tuple[PyTree, PyTree]:
        return self.left.init(), self.right.init()

    def prepare(self, batch, state):
        left, left_state = self.left.prepare(batch, state[0])
        right, right_state = self.right.prepare(batch, state[1])
        return (left, right), (left_state, right_state)

    def halves(self, batch: Batch) -> tuple[Batch, Batch]:
        """The batch as either piece sees it: with what that piece prepared."""
        left, right = (None, None) if batch.prepared is None else batch.prepared
        return (
            dataclasses.replace(batch, prepared=left),
            dataclasses.replace(batch, prepared=right),
        )


class AddTerms(Pair, AbstractTerm):
    """The sum of two terms.

    Where both report a metric of one name, parts of the loss (`loss/...`) add up; of any other
    metric the left term's value stands.
    """

    left: AbstractTerm
    right: AbstractTerm

    def __call__(self, scores, batch):
        left_batch, right_batch = self.halves(batch)
        left, left_metrics = self.left(scores, left_batch)
        right, right_metrics = self.right(scores, right_batch)
        shared = {
            name: left_metrics[name] + right_metrics[name]
            for name in left_metrics.keys() & right_metrics.keys()
            if name.startswith("loss/")
        }
        return left + right, right_metrics | left_metrics | shared

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, AddTerms) else repr(self.right)
        return f"{self.left!r} + {right}"


class ScaledTerm(AbstractTerm):
    """A term times a number. Metrics stay those of the unscaled term."""

    factor: ScalarLike
    term: AbstractTerm

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.term.requires

    def init(self) -> PyTree:
        return self.term.init()

    def prepare(self, batch, state):
        return self.term.prepare(batch, state)

    def __call__(self, scores, batch):
        value, metrics = self.term(scores, batch)
        return self.factor * value, metrics

    def __repr__(self) -> str:
        return f"{number(self.factor)} * {in_product(self.term)}"


def in_product(term: AbstractTerm) -> str:
    """The term as the right operand of `*`."""
    simple = isinstance(term, Term) or type(term).__repr__ is eqx.Module.__repr__
    return repr(term) if simple else f"({term!r})"


class LiftedPiece(Prepares):
    """A function `(scores, batch, **hyperparameters) -> (value, metrics)` as a term or a factor."""

    lifted: Lifted
    requires: frozenset[str] = eqx.field(static=True)  # pyright: ignore
    preparing: Callable[..., PyTree] | None = eqx.field(static=True)

    def prepare(self, batch, state):
        if self.preparing is None:
            return None, state
        return self.preparing(batch, **self.lifted.hyperparameters), state

    def __call__(self, scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
        check_prepared(self, self.preparing, batch)
        value, metrics = self.lifted(scores, batch)
        return zero_unmasked(value, batch.rollout.mask), metrics

    def __repr__(self) -> str:
        return repr(self.lifted)


class Term(LiftedPiece, AbstractTerm):
    """A lifted function as a term."""


def check_prepared(piece: Prepares, preparing: Callable | None, batch: Batch) -> None:
    """Refuses a batch that `prepare` has not seen, if the piece has something to prepare."""
    if preparing is not None and batch.prepared is None:
        raise ValueError(
            f"`{piece!r}` reads `batch.prepared`, which is None; take the batch from "
            "`algorithm.assign`, which prepares it on all rows of the rollout"
        )


def term(
    fn: Callable[..., tuple[PerToken, Metrics]],
    *,
    builder: Callable | None = None,
    requires: tuple[str, ...] = (),
    prepare: Callable[..., PyTree] | None = None,
    **hyperparameters: Any,
) -> Term:
    """Lifts a typed function to a loss term.

    Args:
        fn: `(scores, batch, **hyperparameters) -> (per-token value, additive metrics)`.
        builder: the public function that the term prints as; `fn` itself by default.
        requires: optional `Rollout` fields that `fn` or `prepare` reads.
        prepare: `(batch, **hyperparameters) -> arrays [batch time]`, computed once on all rows of
            a rollout; `fn` finds them in `batch.prepared`.
        **hyperparameters: passed to both by keyword.

    Returns:
        A term that adds, scales, prints and compares like the built-in ones.
    """
    lifted = lift(fn, builder, hyperparameters)
    return Term(lifted=lifted, requires=frozenset(requires), preparing=prepare)


def weighted(value: PerToken, batch: Batch) -> Float[Array, ""]:
    """This part's share of the loss: `sum(weights * value)` over masked tokens."""
    return jnp.sum(batch.weights * zero_unmasked(value, batch.rollout.mask))
