"""A cost of length that prompts pay only as far as they are solved."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._checks import check_number
from .._masked import group_sum, live_rows, on_last, row_length, row_total, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerRow, PerToken, Rollout, ScalarLike


def length_cost(coef: ScalarLike, *, threshold: ScalarLike = 0.0) -> Stateless:
    r"""Linear cost of relative length, scaled by the prompt's pass rate.

    The reward on the last masked token of row $i$ changes by
    $-coef \cdot p_g \cdot L_i / \max_{j \in g} L_j$: $L$ counts masked tokens, stop token included
    and gaps not, and $p_g$ is the share of the group's live rows whose total is above `threshold`.
    A prompt that nobody solves costs nothing, one that everybody solves the whole coefficient for
    its longest completion. Right and wrong completions pay alike. Rows of equal length and reward
    pay alike, so a baseline over the group takes the cost away again; the only live row of a
    group pays $coef \cdot p_g$. Empty rows enter no statistic and stay 0; truncated rows count
    like others.

    Totals are read as they stand in the chain: put it before shaping that moves them across
    `threshold`.

    Differs between libraries: prime-rl adds costs of tool output and of turns, at 0.25 for
    generated tokens and 0.1 for each of the others, every one over its own group maximum.

    Args:
        coef: cost of the longest completion of a solved prompt, not negative.
        threshold: a completion passes if its total is above this.

    Returns:
        A transform from rewards to rewards; it must stand before the signal is spread.

    Source: prime-rl's length penalty.
    """
    check_number("coef", coef, least=0)
    check_number("threshold", threshold)
    return stateless(
        _length_cost,
        builder=length_cost,
        reads_total=True,
        min_group=2,
        coef=coef,
        threshold=threshold,
    )


def _length_cost(
    signal: PerToken, rollout: Rollout, *, coef: ScalarLike, threshold: ScalarLike
) -> PerToken:
    mask, group, live = rollout.mask, rollout.group, live_rows(rollout.mask)
    passed = (live & (row_total(signal, mask) > threshold)).astype(signal.dtype)
    count = group_sum(live.astype(signal.dtype), group)
    rate = group_sum(passed, group) / jnp.maximum(count, 1)
    length = row_length(mask).astype(signal.dtype)
    relative = length / jnp.maximum(group_max(length, group), 1)
    return zero_unmasked(signal, mask) - on_last(coef * rate * relative, mask)


def group_max(row: PerRow, group: Int[Array, " batch"]) -> PerRow:
    """For each row, the greatest of `row` over the rows that share its group id."""
    return jax.ops.segment_max(row, group, num_segments=row.shape[0])[group]
