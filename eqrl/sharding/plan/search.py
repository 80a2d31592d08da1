"""The largest size that fits, with few compilations."""

import sys
from collections.abc import Callable


def search(spare: Callable[[int], int], low: int, high: int, *, tries: int = 8) -> int | None:
    """The largest n from `low` to `high` for which memory suffices.

    Memory is nearly a line in n: the line through the two ends says where it meets the capacity,
    and that guess is then confirmed or corrected by trying it and its neighbour. Compilers refuse
    what is far too large quickly.

    Args:
        spare: bytes left over with size n, below 0 if it does not fit; should not grow with n. Each
            call compiles a program, and no size is tried twice.
        low: the smallest size.
        high: the largest size.
        tries: calls of `spare` at most.

    Returns:
        The largest size that was tried and fits; the largest of all, unless `tries` ran out. `None`
        if not even `low` fits.

    Raises:
        ValueError: if there is no size between `low` and `high`.
    """
    if low > high:
        raise ValueError(f"low={low} must not be above high={high}")
    known = {low: spare(low)}
    if known[low] < 0:
        return None
    fits, over = low, high + 1  # over: the smallest size known, or not allowed, not to fit
    while over - fits > 1 and len(known) < tries:
        guess = min(max(_guess(known, fits), fits + 1), over - 1)
        known[guess] = spare(guess)
        if known[guess] < 0:
            over = guess
        else:
            fits = guess
    return fits


def _guess(known: dict[int, int], fits: int) -> int:
    """Where the line meets 0 that goes through the two sizes next to the border.

    Those are the largest that fits and the smallest that does not, or else the two largest. From
    one size there is no line: the other end comes next.
    """
    near = [*sorted(n for n in known if n <= fits)[-2:], *sorted(n for n in known if n > fits)[:1]]
    if len(near) > 1:
        a, b = near[-2:]
        slope = (known[a] - known[b]) / (b - a)
        if slope > 0:
            return int(a + known[a] / slope)
    return sys.maxsize
