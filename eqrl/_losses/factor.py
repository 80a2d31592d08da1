"""Factors: per-token coefficients of a term.

`f * term` multiplies a term's values by `f(scores, batch)`, through which no gradient flows:
importance weights, masks, adaptive coefficients. `f * g` multiplies factors. The weights of the
reduction stay what they were, so a factor that masks half of the tokens halves the step; where the
rest should carry the full weight, `normalised(f)` says so.

A selection is a factor too: `drop_truncated() * clipped()` keeps those rows out of this term only,
after they have taken part in every statistic.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .._lifted import lift, number
from .._masked import zero_unmasked
from .._select.base import AbstractSelection, Both
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import AbstractTerm, LiftedPiece, Pair, Prepares, check_prepared, in_product


class AbstractFactor(Prepares):
    """A per-token coefficient.

    Attributes:
        reads_scores: False if it is the same whatever the policy in training says.
    """

    reads_scores: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
        """The coefficient of each masked token, and additive metrics."""

    @overload
    def __mul__(self, other: AbstractTerm) -> "FactorTerm": ...

    @overload
    def __mul__(self, other: "AbstractFactor | AbstractSelection | ScalarLike") -> "Product": ...

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, AbstractTerm):
            return FactorTerm(self, other)
        right = as_factor(other)
        return NotImplemented if right is None else Product(self, right)

    def __rmul__(self, other: Any) -> "Product":
        left = as_factor(other)
        return NotImplemented if left is None else Product(left, self)


class Product(Pair, AbstractFactor):
    """The product of two factors; of a metric both report, the left factor's value stands."""

    left: AbstractFactor
    right: AbstractFactor

    @property
    def reads_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.reads_scores or self.right.reads_scores

    def __call__(self, scores, batch):
        left_batch, right_batch = self.halves(batch)
        left, left_metrics = self.left(scores, left_batch)
        right, right_metrics = self.right(scores, right_batch)
        return left * right, right_metrics | left_metrics

    def __repr__(self) -> str:
        right = f"({self.right!r})" if isinstance(self.right, Product) else repr(self.right)
        return f"{self.left!r} * {right}"


class FactorTerm(Pair, AbstractTerm):
    """A term times a factor. Metrics stay those of the unweighted term."""

    left: AbstractFactor
    right: AbstractTerm

    def __call__(self, scores, batch):
        factor_batch, term_batch = self.halves(batch)
        factor, factor_metrics = self.left(scores, factor_batch)
        value, metrics = self.right(scores, term_batch)
        # The factor is 0 on unmasked positions already, as is the value.
        return lax.stop_gradient(factor) * value, metrics | factor_metrics

    def __repr__(self) -> str:
        return f"{self.left!r} * {in_product(self.right)}"


class Constant(AbstractFactor):
    """A number as a factor: `0.5 * tis()`."""

    value: ScalarLike

    reads_scores = False

    def __call__(self, scores, batch):
        dtype = batch.advantages.dtype
        everywhere = jnp.broadcast_to(jnp.asarray(self.value, dtype), batch.advantages.shape)
        return zero_unmasked(everywhere, batch.rollout.mask), {}

    def __repr__(self) -> str:
        return number(self.value)


class Kept(AbstractFactor):
    """A selection as a factor: 1 on the tokens of kept rows, 0 on those of the others."""

    selection: AbstractSelection

    reads_scores = False

    def prepare(self, batch, state):
        # On all rows: a selection may compare rows of one group.
        mask = batch.rollout.mask
        keep = mask & self.selection(batch.rollout)[:, None]
        return keep.astype(batch.advantages.dtype), state

    def __call__(self, scores, batch):
        check_prepared(self, self.prepare, batch)
        return batch.prepared, {"select/kept_frac": batch.mean(batch.prepared)}

    def __repr__(self) -> str:
        # `&` binds weaker than `*`.
        return f"({self.selection!r})" if isinstance(self.selection, Both) else repr(self.selection)


def as_factor(x: Any) -> AbstractFactor | None:
    """A factor, selection or number as a factor; `None` for anything else."""
    if isinstance(x, AbstractFactor):
        return x
    if isinstance(x, AbstractSelection):
        return Kept(x)
    return Constant(x) if isinstance(x, bool | int | float | jax.Array) else None


class Factor(LiftedPiece, AbstractFactor):
    """A lifted function as a factor."""

    reads_scores: bool = eqx.field(static=True)  # pyright: ignore


def factor(
    fn: Callable[..., tuple[PerToken, Metrics]],
    *,
    builder: Callable | None = None,
    requires: tuple[str, ...] = (),
    prepare: Callable[..., PyTree] | None = None,
    reads_scores: bool = True,
    **hyperparameters: Any,
) -> Factor:
    """Lifts a typed function to a factor.

    Args:
        fn: `(scores, batch, **hyperparameters) -> (per-token coefficient, additive metrics)`.
        builder: the public function that the factor prints as; `fn` itself by default.
        requires: optional `Rollout` fields that `fn` or `prepare` reads.
        prepare: see `term`.
        reads_scores: see `AbstractFactor`.
        **hyperparameters: passed to both by keyword.

    Returns:
        A factor that multiplies, prints and compares like the built-in ones.
    """
    lifted = lift(fn, builder, hyperparameters)
    return Factor(
        lifted=lifted,
        requires=frozenset(requires),
        reads_scores=reads_scores,
        preparing=prepare,
    )


def before_update(batch: Batch, needed: bool = True) -> Scores:
    """What the policy that sampled would score, for factors that are judged in `prepare`.

    Args:
        batch: all rows of a rollout.
        needed: whether the log-probs are read; if not, they may be absent.
    """
    rollout = batch.rollout
    mask, nothing = rollout.mask, jnp.zeros_like(batch.advantages)
    old = rollout.need("old_logprobs") if needed else nothing
    entropy = nothing if rollout.old_entropy is None else rollout.old_entropy
    return Scores(zero_unmasked(old, mask), zero_unmasked(entropy, mask), rollout.values)


def with_prepared(batch: Batch, prepared: PyTree) -> Batch:
    """The batch as a piece sees it that prepared `prepared`."""
    return dataclasses.replace(batch, prepared=prepared)
