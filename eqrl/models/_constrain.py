"""Where activations lie while a mesh is set."""

import math

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from ._partition import ACTIVATIONS, ROWS


def constrain(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """The array cut as `ACTIVATIONS[name]` says; axes before those of the table stay whole.

    Parameters are cut along their width. Left alone, XLA may cut activations that way too, and move
    them between devices at every layer. Without `jax.set_mesh` nothing happens, and an axis that
    does not divide stays whole.
    """
    return _cut(x, (None,) * (x.ndim - len(ACTIVATIONS[name])) + ACTIVATIONS[name])


def by_rows(x: Shaped[Array, "*shape"], *, axis: int = 0) -> Shaped[Array, "*shape"]:
    """The array with its rows, along `axis`, over `data` and `fsdp`, and whole otherwise."""
    return _cut(x, (*[None] * axis, ROWS, *[None] * (x.ndim - axis - 1)))


def _cut(x, axes):
    sizes = jax.sharding.get_abstract_mesh().shape
    found = []
    for names, size in zip(axes, x.shape, strict=True):
        names = tuple(name for name in names or () if name in sizes)
        divides = names and size % math.prod(sizes[name] for name in names) == 0
        found.append(names if divides else None)
    if not any(found):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(*found))
