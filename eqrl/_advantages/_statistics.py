"""What the baselines share: centring that is exact for equal scores, and safe deviations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from .._masked import group_first, group_sum, live_rows, row_total
from .._types import Mask, PerRow, PerToken, Rollout, ScalarLike


def refuse_singletons(rollout: Rollout, name: str) -> None:
    """Refuses a live row that is alone in its group, where the group ids are known.

    Under `jit` they are not: there such a row gets an advantage of exactly 0, and a training
    script refuses it before the run with `check_groups`.

    Raises:
        ValueError: naming the transform and the group.
    """
    group, mask = rollout.group, rollout.mask
    if isinstance(group, Tracer) or isinstance(mask, Tracer):
        return
    ids = np.asarray(group)
    alone = np.bincount(ids, minlength=1)[ids] == 1
    alone &= np.asarray(mask).any(axis=1)
    if alone.any():
        raise ValueError(
            f"`{name}` compares completions of one prompt, but group {ids[alone][0]} of "
            "`rollout.group` has only one; sample at least 2 completions per prompt, or use "
            "`batch_center()`"
        )


def centre_groups(
    signal: PerToken, mask: Mask, group: Int[Array, " batch"]
) -> tuple[PerRow, PerRow]:
    """Each live row's total minus its group's mean total, and the group's number of live rows.

    Totals are first taken relative to the group's first live row: a mean of equal floats need
    not equal them, and dividing that rounding error by its own deviation gives advantages of
    order one. Empty rows get 0 and count nowhere.
    """
    return centre_within(row_total(signal, mask), live_rows(mask), group)


def centre_within(
    row: PerRow, live: Bool[Array, " batch"], group: Int[Array, " batch"]
) -> tuple[PerRow, PerRow]:
    """As `centre_groups`, of one number a row; whatever empty rows hold does not matter."""
    relative = relative_to_first(row, live, group)
    count = group_sum(live.astype(row.dtype), group)
    mean = group_sum(relative, group) / jnp.maximum(count, 1)
    return jnp.where(live, relative - mean, jnp.zeros_like(row)), count


def relative_to_first(
    row: PerRow, live: Bool[Array, " batch"], group: Int[Array, " batch"]
) -> PerRow:
    """Live rows minus their group's first live row; empty rows 0."""
    zero = jnp.zeros_like(row)
    safe = jnp.where(live, row, zero)
    return jnp.where(live, safe - group_first(safe, live, group), zero)


def centre(
    x: Float[Array, " n"], live: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Live entries of `x` minus their mean, 0 elsewhere, and their number.

    Exactly 0 when all live entries are equal, for the reason given in `centre_groups`.
    """
    zero = jnp.zeros((), x.dtype)
    safe = jnp.where(live, x, zero)
    relative = jnp.where(live, safe - safe[jnp.argmax(live)], zero)
    count = jnp.sum(live.astype(x.dtype))
    mean = jnp.sum(relative) / jnp.maximum(count, 1)
    return jnp.where(live, relative - mean, zero), count


def variance(
    squares: Float[Array, "*shape"], count: Float[Array, "*shape"], ddof: ScalarLike
) -> Float[Array, "*shape"]:
    """`squares / (count - ddof)`; 0 where there are no more than `ddof` entries."""
    freedom = count - ddof
    return jnp.where(freedom > 0, squares / jnp.where(freedom > 0, freedom, 1), 0 * squares)


def over_deviation(centred: PerRow, variance: Float[Array, "*any"], eps: ScalarLike) -> PerRow:
    """`centred / (sqrt(variance) + eps)`; 0 where the variance is 0, also for `eps = 0`."""
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, jnp.ones_like(variance)))
    return jnp.where(varies, centred / (deviation + eps), jnp.zeros_like(centred))


def sort_groups(
    live: Bool[Array, " batch"], group: Int[Array, " batch"], *keys: PerRow
) -> tuple[Int[Array, " batch"], Int[Array, " batch"], Int[Array, " batch"]]:
    """An order of rows in which the live rows of each group stand side by side.

    Args:
        live: empty rows come last, each for itself.
        group: the group ids.
        *keys: within a group, rows ascend by these.

    Returns:
        The row at each place, and how many of its group stand before it and behind it.
    """
    size = live.shape[0]
    place = jnp.arange(size, dtype=jnp.int32)
    name = jnp.where(live, group, jnp.asarray(size, group.dtype))
    fixed = tuple(lax.stop_gradient(key) for key in keys)
    name, *_, order = lax.sort((name, *fixed, place), num_keys=1 + len(keys))
    first = jax.ops.segment_min(place, name, size + 1, indices_are_sorted=True)[name]
    last = jax.ops.segment_max(place, name, size + 1, indices_are_sorted=True)[name]
    grouped = name < size
    return order, jnp.where(grouped, place - first, 0), jnp.where(grouped, last - place, 0)


def unsort(x: Shaped[Array, " batch"], order: Int[Array, " batch"]) -> Shaped[Array, " batch"]:
    """Undoes `x[order]`."""
    return jnp.zeros_like(x).at[order].set(x)


def scan_within(
    join: Callable[[PyTree, PyTree], PyTree],
    x: PyTree[Shaped[Array, " batch"]],
    room: Int[Array, " batch"],
    *,
    reverse: bool = False,
) -> PyTree[Shaped[Array, " batch"]]:
    """Running `join` over the rows of each group, in the order of `sort_groups`; itself included.

    Each round doubles how far a row has looked, and rounds beyond the largest group are skipped.
    One compiled round serves them all; `lax.associative_scan` compiles each anew, for seconds.

    Args:
        join: an associative function of what has been joined so far and what comes next.
        x: what is joined.
        room: how many rows of the group stand before each, or behind it if `reverse`.
        reverse: whether to run from the end of each group to its beginning.
    """

    def double(step, x):
        far = jnp.left_shift(1, step).astype(room.dtype)
        beyond = jax.tree.map(lambda leaf: jnp.roll(leaf, -far if reverse else far), x)
        pick = lambda joined, leaf: jnp.where(room >= far, joined, leaf)  # noqa: E731
        return jax.tree.map(pick, join(beyond, x), x)

    def round_of(step, x):
        return lax.cond(deepest >> step > 0, double, lambda _, x: x, step, x)

    deepest = jnp.max(room)
    return lax.fori_loop(0, (room.shape[0] - 1).bit_length(), round_of, x)


@jax.jit  # Outside `jit` this would run as many separate programs.
def leave_one_out(
    row: PerRow, live: Bool[Array, " batch"], group: Int[Array, " batch"]
) -> tuple[PerRow, PerRow, PerRow]:
    """Each live row against the *other* live rows of its group.

    The others are merged from those before and those behind the row: taking one row out of the
    whole group's sums loses all digits where the others lie close together. Merging equal numbers
    is exact.

    Returns:
        The row minus the others' mean, the others' squared distances from their mean summed up
        (exactly 0 where the others are equal), and their number. All 0 for a row without others.
    """
    order, ahead, behind = sort_groups(live, group)
    score = jnp.where(live, row, jnp.zeros_like(row))[order]
    single = (live[order].astype(row.dtype), score, jnp.zeros_like(score))

    def neighbours(room, reverse):
        upto = scan_within(_merge, single, room, reverse=reverse)
        beside = jax.tree.map(lambda x: jnp.roll(x, -1 if reverse else 1), upto)
        return jax.tree.map(lambda x: jnp.where(room > 0, x, jnp.zeros_like(x)), beside)

    count, mean, squares = _merge(neighbours(ahead, False), neighbours(behind, True))
    centred = jnp.where(count > 0, score - mean, jnp.zeros_like(score))
    return unsort(centred, order), unsort(squares, order), unsort(count, order)


def _merge(a: tuple[PerRow, ...], b: tuple[PerRow, ...]) -> tuple[PerRow, ...]:
    """Number, mean and summed squares of two samples taken together; equal means add nothing."""
    (a_count, a_mean, a_squares), (b_count, b_mean, b_squares) = a, b
    count = a_count + b_count
    share = b_count / jnp.maximum(count, 1)
    apart = b_mean - a_mean
    mean = a_mean + apart * share
    return count, mean, a_squares + b_squares + apart**2 * a_count * share
