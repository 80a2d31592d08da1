"""Training and held-out problems must not overlap."""

from collections.abc import Hashable, Iterable


def assert_disjoint(train_keys: Iterable[Hashable], held_out_keys: Iterable[Hashable]) -> None:
    """Refuse a split in which a problem stands on both sides.

    Args:
        train_keys: what identifies each training problem, as its question.
        held_out_keys: the same for the held-out problems.

    Raises:
        ValueError: with the number of shared keys and the first one in training order.
    """
    held_out = set(held_out_keys)
    shared = list(dict.fromkeys(key for key in train_keys if key in held_out))
    if shared:
        raise ValueError(
            f"{len(shared)} problems are both in training and held out, the first is "
            f"{str(shared[0])[:120]!r}; remove them from one side"
        )
