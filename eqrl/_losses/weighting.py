"""Weightings: how per-token values become one number, as an array of weights.

`loss = sum(weights * value)`, and the weights are computed from the mask of *all* rows of one
optimizer step, before any split into micro-batches. A row without masked token has no weight and
counts in no denominator, so padding a batch with empty rows changes nothing.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._checks import check_number
from .._lifted import Lifted, lift
from .._masked import live_rows, row_length, token_share, zero_unmasked
from .._types import Mask, PerRow, PerToken, ScalarLike


class Weighting(eqx.Module):
    """A function `(mask, **hyperparameters) -> weights`; prints as the call that builds it."""

    lifted: Lifted

    def __call__(self, mask: Mask) -> PerToken:
        return self.lifted(mask)

    def __repr__(self) -> str:
        return repr(self.lifted)


def weighting(
    fn: Callable[..., PerToken], *, builder: Callable | None = None, **hyperparameters: Any
) -> Weighting:
    """Lifts a typed function to a weighting.

    Args:
        fn: `(mask, **hyperparameters) -> weights`, zero on unmasked positions.
        builder: the public function that the weighting prints as; `fn` itself by default.
        **hyperparameters: passed to `fn` by keyword.

    Returns:
        A weighting that prints and compares like the built-in ones.
    """
    return Weighting(lift(fn, builder, hyperparameters))


def _row_mean(mask: Mask) -> PerRow:
    """1 / B+ for each live row, where B+ is the number of live rows; 0 for empty rows."""
    live = live_rows(mask).astype(jnp.result_type(float))
    return live / jnp.maximum(jnp.sum(live), 1)


def token_mean() -> Weighting:
    """Mean over all trained tokens: every token weighs the same, long completions more.

    `mask / sum(mask)`. DAPO's reduction, verl's and TRL's default (TRL's name: "dapo").

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476).
    """
    return weighting(token_share, builder=token_mean)


def sequence_mean() -> Weighting:
    """Mean over completions of each one's token mean: every completion weighs the same.

    `mask / (length * B+)`, where B+ counts completions with at least one masked token. GRPO's
    reduction; TRL's "grpo" divides by all rows instead, as verl does in distributed runs.

    Source: Shao et al. 2024 (GRPO, arXiv:2402.03300).
    """
    return weighting(_sequence_mean, builder=sequence_mean)


def _sequence_mean(mask: Mask) -> PerToken:
    per_row = _row_mean(mask) / jnp.maximum(row_length(mask), 1)
    return zero_unmasked(jnp.broadcast_to(per_row[:, None], mask.shape), mask)


def sequence_sum() -> Weighting:
    """Mean over completions of each one's token sum: the log-likelihood of whole completions.

    `mask / B+`, where B+ counts completions with at least one masked token. The textbook policy
    gradient; verl's "seq-mean-token-sum".

    Source: Williams 1992, taking a completion for one action.
    """
    return weighting(_sequence_sum, builder=sequence_sum)


def _sequence_sum(mask: Mask) -> PerToken:
    return zero_unmasked(jnp.broadcast_to(_row_mean(mask)[:, None], mask.shape), mask)


def constant_length(length: ScalarLike) -> Weighting:
    """Token sum over a constant: no completion's weight depends on its length.

    `mask / (length * B+)`, where B+ counts completions with at least one masked token. Dr. GRPO's
    reduction; TRL's "dr_grpo" divides by all rows; verl's divides by the padded width of the
    batch unless told a constant.

    Args:
        length: the constant, usually the largest completion length in tokens; above 0.

    Source: Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783).
    """
    check_number("length", length, above=0)
    return weighting(_constant_length, builder=constant_length, length=length)


def _constant_length(mask: Mask, *, length: ScalarLike) -> PerToken:
    return _sequence_sum(mask) / length
