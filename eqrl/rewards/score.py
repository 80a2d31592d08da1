"""Run reward functions over a batch; whatever one of them does costs that sample only."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from .deadline import Call, Overtime, deadline
from .named import reward_names


_LOG = logging.getLogger("eqrl")
_LARGEST = float(np.finfo(np.float32).max)
# What `float` would accept or cut short, though it is no real number.
_NO_NUMBERS = (str, bytes, complex, np.complexfloating)
# Functions already complained about: one warning a function and process, not one a sample.
_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the reward functions said, unweighted.

    Attributes:
        components: one column a function, raw; 0 where the function failed.
        failed: True where any function failed on the sample.
        errors: calls that raised, or returned something other than a finite number.
        timeouts: calls that passed the time limit.
        first_error: the first failure of this batch in words, if there was one.
    """

    components: Float32[np.ndarray, "batch component"]
    failed: Bool[np.ndarray, " batch"]
    errors: int
    timeouts: int
    first_error: str | None


def score(
    functions: Sequence[Callable[[str, Mapping[str, Any]], Any]],
    completions: Sequence[str],
    examples: Sequence[Mapping[str, Any]],
    *,
    timeout: int | float = 5.0,
) -> Scored:
    """Call every function on every sample.

    A function that raises, returns no finite number or takes too long gives 0 for that sample,
    which is marked and counted; the first failure of each function is logged as one warning.
    `KeyboardInterrupt` and `SystemExit` pass through.

    Args:
        functions: rewards, each `fn(completion, example) -> float`.
        completions: decoded completions.
        examples: the dataset record of each completion, repeated within a group.
        timeout: seconds allowed to one call.

    Returns:
        The raw components with the counts of what went wrong.

    Raises:
        ValueError: if `functions` is empty, lengths differ, or `timeout` is not positive.
    """
    _check(functions, completions, examples, timeout)
    components = np.zeros((len(completions), len(functions)), np.float32)
    failed = np.zeros(len(completions), bool)
    counts = {"errors": 0, "timeouts": 0}
    first_error = None
    names = reward_names(functions)
    with deadline() as call:
        for row, (completion, example) in enumerate(zip(completions, examples, strict=True)):
            for column, function in enumerate(functions):
                value, kind, why = _one(call, partial(function, completion, example), timeout)
                components[row, column] = value
                if kind is not None:
                    failed[row] = True
                    counts[kind] += 1
                    message = f"{names[column]} {why}"
                    first_error = first_error or message
                    _warn_once(names[column], message)
    return Scored(components, failed, counts["errors"], counts["timeouts"], first_error)


def _one(call: Call, fn: Callable[[], Any], timeout: int | float) -> tuple[float, str | None, str]:
    """One call's value, and if it failed, how it is counted and why."""
    try:
        value = call(lambda: _number(fn()), timeout)
    except Overtime as error:
        return 0.0, "timeouts", str(error)
    except Exception as error:  # user code must not end the run
        return 0.0, "errors", f"raised {type(error).__name__}: {str(error)[:200]}"
    if value is None:
        return 0.0, "errors", "returned something other than a finite number"
    return value, None, ""


def _number(value: Any) -> float | None:
    """`value` as a finite number that float32 can hold, or `None`; text is no number."""
    if isinstance(value, _NO_NUMBERS) or getattr(value, "shape", ()) != ():
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None  # false for NaN, too


def _warn_once(name: str, message: str) -> None:
    if name not in _warned:
        _warned.add(name)
        _LOG.warning("reward function %s; counted as 0, later failures are only counted", message)


def _check(functions, completions, examples, timeout: int | float) -> None:
    if not functions:
        raise ValueError("`functions` is empty; give at least one reward function")
    if len(completions) != len(examples):
        raise ValueError(
            f"{len(completions)} completions but {len(examples)} examples; `examples` needs one "
            "record a completion, repeated within a group"
        )
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"`timeout` is {timeout}; give a positive number of seconds")
