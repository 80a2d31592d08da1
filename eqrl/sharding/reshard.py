"""A model from one layout to another."""

import functools
from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding

from ..models import Architecture
from .place import shardings


Tree = TypeVar("Tree")


def reshard(tree: Tree, mesh: Mesh, architecture: Architecture) -> Tree:
    """The model cut as `partition_spec` says for another mesh of the same devices.

    Compiled programs exchange parts between devices, one array after the other: compilers want
    room for everything a program moves, and so it is never more than the largest array. No host
    sees them.

    For sampling, which reads every weight for every token: gathering what `fsdp` cuts once a
    rollout is cheaper than once a token wherever a second copy fits. Drop the result before the
    next update to have its memory back.

    Args:
        tree: a model on a mesh.
        mesh: the same devices in the same order, with other axis sizes.
        architecture: of the model.

    Raises:
        ValueError: if the devices are not those the tree lies on.
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)

    def one(x, where: NamedSharding):
        if x.sharding.device_set != where.device_set:
            raise ValueError("mesh must have the devices that the tree lies on; pass those to it")
        return jax.block_until_ready(resharding(where)(x))

    return eqx.combine(jax.tree.map(one, arrays, shardings(arrays, mesh, architecture)), rest)


@functools.lru_cache(maxsize=64)
def resharding(into: NamedSharding):
    """The program behind `reshard`, for one array."""
    return jax.jit(lambda x: x, out_shardings=into)
