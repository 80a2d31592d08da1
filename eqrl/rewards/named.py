"""A reward with settings: a plain callable that knows its metric name and prints as its builder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias


Reward: TypeAlias = Callable[[str, Mapping[str, Any]], float]


@dataclasses.dataclass(frozen=True)
class Named:
    """`fn` under a metric name.

    Attributes:
        fn: what is called.
        name: what metrics call it; also its `__name__`.
        expression: the call that builds it, which is its `repr`.
    """

    fn: Reward
    name: str
    expression: str

    def __call__(self, completion: str, example: Mapping[str, Any]) -> float:
        return self.fn(completion, example)

    def __repr__(self) -> str:
        return self.expression

    @property
    def __name__(self) -> str:
        return self.name


def reward_name(function: Callable[..., Any]) -> str:
    """What metrics call `function`: its `__name__`, through `functools.partial`, or its type's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def reward_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """One distinct name a function, in order: the second `f` is `f_2`."""
    names: list[str] = []
    for function in functions:
        name, count = reward_name(function), 1
        unique = name
        while unique in names:
            count += 1
            unique = f"{name}_{count}"
        names.append(unique)
    return names
