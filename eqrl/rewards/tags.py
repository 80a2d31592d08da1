"""Partial credit for the four tags of a think-then-answer format."""

from collections.abc import Mapping
from typing import Any


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tag_count_reward(completion: str, example: Mapping[str, Any]) -> float:
    """0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>` seen exactly once."""
    del example
    return 0.25 * sum(completion.count(tag) == 1 for tag in TAGS)
