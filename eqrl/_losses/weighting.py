"""Weightings: how per-token values become one number, as an array of weights.

`loss = sum(weights * value)`, and the weights are computed from the mask of *all* rows of one
optimizer step, before any split into micro-batches. A row without masked token has no weight, and
counts in no denominator unless `count_empty` says so; so padding a batch with empty rows changes
nothing.
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


def _row_mean(mask: Mask, count_empty: bool) -> PerRow:
    """1 / B for each live row, where B counts live rows, or all of them; 0 for empty rows."""
    live = live_rows(mask).astype(jnp.result_type(float))
    return live / (max(len(live), 1) if count_empty else jnp.maximum(jnp.sum(live), 1))


def token_mean() -> Weighting:
    """Mean over all trained tokens: every token weighs the same, long completions more.

    `mask / sum(mask)`. DAPO's reduction, verl's and TRL's default (TRL's name: "dapo").

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476).
    """
    return weighting(token_share, builder=token_mean)


def token_sum() -> Weighting:
    """Sum over all trained tokens: 1 on each. The step grows with the batch; verl's "token-sum".

    Returns:
        A weighting.
    """
    return weighting(_token_sum, builder=token_sum)


def _token_sum(mask: Mask) -> PerToken:
    return mask.astype(jnp.result_type(float))


def sequence_mean(*, count_empty: bool = False) -> Weighting:
    """Mean over completions of each one's token mean: every completion weighs the same.

    `mask / (length * B)`. B counts completions with at least one masked token; with `count_empty`
    it counts all rows, so that rows switched off by a selection shrink the step (and so does
    padding with rows). GRPO's reduction; TRL's "grpo" and "sapo" count all rows, as verl does in
    distributed runs.

    Args:
        count_empty: whether rows without a masked token count in B.

    Source: Shao et al. 2024 (GRPO, arXiv:2402.03300).
    """
    return weighting(_sequence_mean, builder=sequence_mean, count_empty=count_empty)


def _sequence_mean(mask: Mask, *, count_empty: bool) -> PerToken:
    per_row = _row_mean(mask, count_empty) / jnp.maximum(row_length(mask), 1)
    return zero_unmasked(jnp.broadcast_to(per_row[:, None], mask.shape), mask)


def sequence_sum(*, count_empty: bool = False) -> Weighting:
    """Mean over completions of each one's token sum: the log-likelihood of whole completions.

    `mask / B`. B counts completions with at least one masked token; with `count_empty`, all rows.
    The textbook policy gradient; verl's "seq-mean-token-sum". With a term whose value is the same
    on each of a completion's tokens, such as `clipped(ratio=geometric_ratio())`, this weighs
    completions by their length: TRL's "luspo".

    Args:
        count_empty: whether rows without a masked token count in B.

    Source: Williams 1992, taking a completion for one action.
    """
    return weighting(_sequence_sum, builder=sequence_sum, count_empty=count_empty)


def _sequence_sum(mask: Mask, *, count_empty: bool) -> PerToken:
    return zero_unmasked(jnp.broadcast_to(_row_mean(mask, count_empty)[:, None], mask.shape), mask)


def constant_length(length: ScalarLike, *, count_empty: bool = False) -> Weighting:
    """Token sum over a constant: no completion's weight depends on its length.

    `mask / (length * B)`. B counts completions with at least one masked token; with `count_empty`,
    all rows. Dr. GRPO's reduction; TRL's "dr_grpo" counts all rows; verl's divides by the padded
    width of the batch unless told a constant.

    Args:
        length: the constant, usually the largest completion length in tokens; above 0.
        count_empty: whether rows without a masked token count in B.

    Source: Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783).
    """
    check_number("length", length, above=0)
    return weighting(
        _constant_length, builder=constant_length, length=length, count_empty=count_empty
    )


def _constant_length(mask: Mask, *, length: ScalarLike, count_empty: bool) -> PerToken:
    return _sequence_sum(mask, count_empty=count_empty) / length
