"""Hyperparameters are checked when a piece is built, not when a run is an hour old."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def check_number(
    name: str,
    value: Any,
    *,
    least: int | float | None = None,
    most: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Refuses a Python number outside its interval; JAX arrays (traced or not) pass unchecked.

    Args:
        name: the argument as the caller typed it.
        value: what was passed.
        least: smallest legal value.
        most: largest legal value.
        above: the value must be greater than this.
        below: the value must be smaller than this.

    Raises:
        ValueError: naming the argument and the legal interval. NaN and infinity are refused.
    """
    if isinstance(value, jax.Array):
        return
    bounds = [
        f"{word} {bound}"
        for word, bound in (
            ("at least", least), ("above", above), ("at most", most), ("below", below),
        )
        if bound is not None
    ]  # fmt: skip
    wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
    if not isinstance(value, bool | int | float | np.number):
        raise ValueError(f"{name}={value!r} is not a number; pass {wanted}")
    legal = (
        bool(np.isfinite(value))
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not legal:
        raise ValueError(f"{name}={value!r} is out of range; pass {wanted}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of `choices`; JAX arrays pass unchecked.

    Raises:
        ValueError: naming the argument and the choices.
    """
    if not isinstance(value, jax.Array) and value not in choices:
        listed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is not known; pass {listed}")
