"""Whether a completion has the form that was asked for, whatever it says."""

import re
from collections.abc import Mapping
from typing import Any

from .named import Named
from .tags import TAGS


_BLOCKS = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_NUMBER = r"-?[$\u20ac\u00a3]?-?[0-9]{1,300}(?:,[0-9]{3}){0,40}(?:[./][0-9]{1,300})?%?"


def reward_format(completion: str, example: Mapping[str, Any]) -> float:
    """1.0 for exactly `<think>...</think><answer>...</answer>`, each tag once, else 0.0.

    White space may stand around and between the two blocks, nothing else.

    The predecessor's function of this name let text after `</answer>` pass and refused any
    separator but one newline.
    """
    del example
    once = all(completion.count(tag) == 1 for tag in TAGS)  # also keeps the match linear
    return float(once and _BLOCKS.fullmatch(completion) is not None)


def answer_marker(marker: str = "####") -> Named:
    """Format of marked answers: 1.0 where the text ends with one line `marker number`.

    The marker must occur exactly once, so listing many candidates earns nothing. A full stop and
    white space after the number are allowed. Reference solutions that end so all pass.

    Args:
        marker: the text that announces the answer.

    Returns:
        A reward named `reward_marker`.

    Raises:
        ValueError: if `marker` is empty.
    """
    if not marker:
        raise ValueError('`marker` is empty; name the text that announces the answer, as "####"')
    line = re.compile(rf"[ \t]{{0,8}}{_NUMBER}\.?\s*")

    def ends_marked(completion: str, example: Mapping[str, Any]) -> float:
        del example
        before, _, after = completion.partition(marker)
        own_line = not before or before.rstrip(" \t").endswith("\n")
        text = after.replace("\u2212", "-")
        return float(own_line and line.fullmatch(text) is not None)

    return Named(ends_marked, "reward_marker", f"answer_marker({marker!r})")


def pattern_format(pattern: str, *, name: str = "reward_format") -> Named:
    """Format by regular expression: 1.0 where the whole completion matches, else 0.0.

    `.` matches newlines. A pattern that backtracks without end is stopped by the time limit of
    `score` on the main thread.

    Args:
        pattern: a regular expression for the whole completion.
        name: what metrics call this reward.

    Returns:
        A reward called `name`.

    Raises:
        ValueError: if `pattern` is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"`pattern` {pattern!r} is no regular expression: {error}") from None

    def matches(completion: str, example: Mapping[str, Any]) -> float:
        del example
        return float(compiled.fullmatch(completion) is not None)

    return Named(matches, name, f"pattern_format({pattern!r}, name={name!r})")
