"""Running through the layers of a model, with something of each layer's own on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jax import lax
from jaxtyping import Array, Float, PyTree

from ..models import Transformer


Residual: TypeAlias = Float[Array, "batch time d"]
# `(x, (layer, *what belongs to it)) -> (x, what is new of it)`
Body: TypeAlias = Callable[[Residual, Any], tuple[Residual, PyTree]]


class Fold(NamedTuple):
    """A way through the layers.

    Attributes:
        layers: those of a model, in the form that `run` wants.
        run: `run(body, x, layers, *caches)` to the residual stream after the last layer, and what
            the body found in each layer, in the form of a cache.
    """

    layers: Callable[[Transformer], PyTree]
    run: Callable[..., tuple[Residual, PyTree]]


def _in_turn(body: Body, x: Residual, *parts: tuple) -> tuple[Residual, tuple]:
    new = []
    for of_layer in zip(*parts, strict=True):
        x, found = body(x, of_layer)
        new.append(found)
    return x, tuple(new)


def _scanned(body: Body, x: Residual, *parts: PyTree) -> tuple[Residual, PyTree]:
    return lax.scan(body, x, parts)


# A copy of the body a layer, and a tuple with an entry a layer. CPUs and GPUs want this: there XLA
# copies the slice of a stacked array at every step of a scan, three times the traffic of a decode
# step. The price is a second copy of the weights while the sampler runs.
IN_TURN = Fold(lambda policy: policy.unstacked(), _in_turn)
# One body, and arrays with a leading layer axis, which TPUs read where they lie: no second copy,
# and no quarter of an hour in the compiler.
SCANNED = Fold(lambda policy: policy.layers, _scanned)
