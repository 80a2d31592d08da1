"""1 for the right number, else 0."""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

from .named import Named, Reward
from .numbers import extract_number, number_after


def correct(*, field: str = "answer", strict: bool = False, marker: str = "####") -> Named:
    """Correctness: 1.0 where the completion's number equals the gold one exactly, else 0.0.

    Lenient reading is `extract_number` (explicit markers first, else the last number); strict
    reading is `number_after(completion, marker)`. Values are compared as fractions, so 0.75
    equals 3/4 and 0.333 does not equal 1/3. A completion without a number earns 0.0.

    Args:
        field: the record's field that holds the gold answer; read leniently in both modes.
        strict: whether only the number after `marker` counts.
        marker: what announces the answer, for `strict`.

    Returns:
        A reward named `reward_correct`, or `reward_correct_strict`.
    """
    read = partial(number_after, marker=marker) if strict else extract_number
    if strict:
        read("")  # refuses an empty marker now rather than on every sample
    options = f"field={field!r}" + (f", strict=True, marker={marker!r}" if strict else "")
    name = "reward_correct_strict" if strict else "reward_correct"
    return Named(_compare(read, field), name, f"correct({options})")


def _compare(read, field: str) -> Reward:
    def compare(completion: str, example: Mapping[str, Any]) -> float:
        if field not in example:
            raise ValueError(
                f"the record has no field {field!r}, only {sorted(example)}; name the gold "
                "answer's field with `field`"
            )
        gold = _gold(str(example[field]))
        if gold is None:
            raise ValueError(
                f"the gold answer {str(example[field])[:60]!r} holds no number; choose another "
                "`field` or a reward of your own"
            )
        return float(read(completion) == gold)

    return compare


@lru_cache(maxsize=65536)
def _gold(text: str) -> Fraction | None:
    return extract_number(text)
