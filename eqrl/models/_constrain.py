"""Where activations lie while a mesh is set."""

import math

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped


def by_rows(x: Shaped[Array, "*shape"], *, axis: int = 0) -> Shaped[Array, "*shape"]:
    """The array with its rows, along `axis`, over `data` and `fsdp`, and whole otherwise.

    Parameters are cut along their width. Left alone, XLA may cut activations that way too, and move
    them between devices at every layer. Without `jax.set_mesh`, or where rows do not divide,
    nothing happens.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = tuple(name for name in ("data", "fsdp") if name in sizes)
    if not rows or x.shape[axis] % math.prod(sizes[name] for name in rows):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, rows))


def in_whole_width(table: Float[Array, "vocab d"]) -> Float[Array, "vocab d"]:
    """An embedding with its entries over `tensor`, and each of them whole.

    A lookup in a table that is cut along its width gives vectors cut that way, which no device
    wants: gathering the table first is the smaller traffic.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if "tensor" not in sizes or table.shape[0] % sizes["tensor"]:
        return table
    return lax.with_sharding_constraint(table, PartitionSpec("tensor", None))
