"""Loss terms: `(scores, batch) -> per-token values and metrics`.

A term never reduces. The reduction is `batch.weights`, computed once for all rows of an optimizer
step, and the loss is `sum(weights * value)`; so the gradient cannot depend on how the batch was
split. Metrics are scalars that *add up* over such parts: each is a sum against `batch.weights` or,
through `batch.mean`, against the token mean. `a + b` adds terms, `0.04 * a` scales one.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._lifted import Lifted, lift, number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores


class AbstractTerm(eqx.Module):
    """One per-token summand of an objective.

    Attributes:
        requires: names of the optional `Rollout` fields this term reads.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def __call__(self, scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
        """Per-token values to minimise, zero on unmasked positions, and additive metrics."""

    def __add__(self, other: "AbstractTerm") -> "AddTerms":
        if not isinstance(other, AbstractTerm):
            return NotImplemented
        return AddTerms(self, other)

    def __mul__(self, factor: ScalarLike) -> "ScaledTerm":
        if isinstance(factor, AbstractTerm):
            return NotImplemented
        return ScaledTerm(factor, self)

    __rmul__ = __mul__


class AddTerms(AbstractTerm):
    """The sum of two terms.

    Where both report a metric of one name, parts of the loss (`loss/...`) add up; of any other
    metric the left term's value stands.
    """

    left: AbstractTerm
    right: AbstractTerm

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.requires | self.right.requires

    def __call__(self, scores, batch):
        left, left_metrics = self.left(scores, batch)
        right, right_metrics = self.right(scores, batch)
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

    def __call__(self, scores, batch):
        value, metrics = self.term(scores, batch)
        return self.factor * value, metrics

    def __repr__(self) -> str:
        inner = repr(self.term)
        if isinstance(self.term, AddTerms | ScaledTerm):
            inner = f"({inner})"
        return f"{number(self.factor)} * {inner}"


class Term(AbstractTerm):
    """A function `(scores, batch, **hyperparameters) -> (value, metrics)` as a term."""

    lifted: Lifted
    requires: frozenset[str] = eqx.field(static=True)  # pyright: ignore

    def __call__(self, scores, batch):
        value, metrics = self.lifted(scores, batch)
        return zero_unmasked(value, batch.rollout.mask), metrics

    def __repr__(self) -> str:
        return repr(self.lifted)


def term(
    fn: Callable[..., tuple[PerToken, Metrics]],
    *,
    builder: Callable | None = None,
    requires: tuple[str, ...] = (),
    **hyperparameters: Any,
) -> Term:
    """Lifts a typed function to a loss term.

    Args:
        fn: `(scores, batch, **hyperparameters) -> (per-token value, additive metrics)`.
        builder: the public function that the term prints as; `fn` itself by default.
        requires: optional `Rollout` fields that `fn` reads.
        **hyperparameters: passed to `fn` by keyword.

    Returns:
        A term that adds, scales, prints and compares like the built-in ones.
    """
    return Term(lifted=lift(fn, builder, hyperparameters), requires=frozenset(requires))


def weighted(value: PerToken, batch: Batch) -> Float[Array, ""]:
    """This part's share of the loss: `sum(weights * value)` over masked tokens."""
    return jnp.sum(batch.weights * zero_unmasked(value, batch.rollout.mask))
