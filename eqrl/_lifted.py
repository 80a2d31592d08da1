"""A typed function together with its hyperparameters, as one printable tree.

What `eqrl.stateless`, `eqrl.term` and the weightings have in common.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer


class Lifted(eqx.Module):
    """`fn(*arguments, **hyperparameters)`, waiting for its arguments.

    Numbers and arrays are leaves of the tree, so `jax.vmap` over them works; words, booleans and
    `None` are its structure, so a function may branch on them.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...] = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    fn: Callable = eqx.field(static=True)
    builder: Callable = eqx.field(static=True)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All of them by name, leaves and options alike."""
        return dict(zip(self.names, self.values, strict=True)) | dict(self.options)

    def __call__(self, *arguments: Any) -> Any:
        return self.fn(*arguments, **self.hyperparameters)

    def __repr__(self) -> str:
        return spell(self.builder, self.hyperparameters)


def lift(fn: Callable, builder: Callable | None, hyperparameters: dict[str, Any]) -> Lifted:
    """Binds hyperparameters to a function.

    Args:
        fn: the function.
        builder: the public function that the result prints as; `fn` itself if `None`.
        hyperparameters: passed to `fn` by keyword.
    """
    fixed = {
        name: value
        for name, value in sorted(hyperparameters.items())
        if value is None or isinstance(value, str | bool)
    }
    free = {name: hyperparameters[name] for name in sorted(hyperparameters.keys() - fixed.keys())}
    return Lifted(
        values=tuple(free.values()),
        names=tuple(free),
        options=tuple(fixed.items()),
        fn=fn,
        builder=fn if builder is None else builder,
    )


def number(x: Any) -> str:
    """A hyperparameter as it would be typed."""
    concrete = isinstance(x, jax.Array) and x.ndim == 0 and not isinstance(x, Tracer)
    if concrete or isinstance(x, np.generic):
        x = x.item()
    return repr(x)


def spell(builder: Callable, hyperparameters: dict[str, Any]) -> str:
    """The call of `builder` that gives these hyperparameters, defaults left out.

    Hyperparameters without a default are written by position while that is legal.
    """
    words = []
    for name, parameter in inspect.signature(builder).parameters.items():
        if name not in hyperparameters:
            continue
        value = hyperparameters[name]
        default = parameter.default
        if parameter.kind is parameter.VAR_POSITIONAL:
            words.extend(number(one) for one in value)
        elif default is parameter.empty:
            keyword_only = parameter.kind is parameter.KEYWORD_ONLY
            words.append(f"{name}={number(value)}" if keyword_only else number(value))
        elif isinstance(value, jax.Array) or type(value) is not type(default) or value != default:
            words.append(f"{name}={number(value)}")
    return f"{builder.__name__}({', '.join(words)})"
