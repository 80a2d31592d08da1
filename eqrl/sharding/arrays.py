"""Arrays that no process holds alone: from the rows of each, and back to them."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from .mesh import ROWS, row_shards


Tree = TypeVar("Tree")


def row_part(mesh: Mesh) -> tuple[int, int]:
    """Which block of a batch's rows this process holds, and how many blocks there are.

    That is `(process index, process count)`, unless `tensor` reaches across processes: then those
    processes hold the same rows.

    Raises:
        ValueError: if the rows of this process are not one block of them.
    """
    shards = row_shards(mesh)
    where = _rows(mesh).addressable_devices_indices_map((shards,))
    own = sorted({index[0].indices(shards)[0] for index in where.values() if index is not None})
    first, size = own[0], len(own)
    if own != list(range(first, first + size)) or first % size or shards % size:
        raise ValueError(
            f"process {jax.process_index()} would hold the row blocks {own} of {shards}, which do "
            "not lie together; build the mesh from jax.devices() in their order"
        )
    return first // size, shards // size


def to_global(tree: Tree, mesh: Mesh) -> Tree:
    """Global arrays from the rows that each process gives, spread over `data` and `fsdp`.

    Args:
        tree: of arrays `[rows of this process, ...]`, block `row_part(mesh)` of all rows. Equally
            many in each process. Every process must call this.
        mesh: the devices.

    Raises:
        ValueError: if rows do not divide among the devices; pad them with `eqrl.pad_rows`.
    """
    sharding = _rows(mesh)
    parts = row_part(mesh)[1]
    own = row_shards(mesh) // parts

    def one(x):
        if not isinstance(x, jax.Array | np.ndarray):
            return x
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[0] % own:
            raise ValueError(
                f"an array of shape {x.shape} has no rows that divide over the {own} row shards "
                "of this process; pad them with pad_rows"
            )
        shape = (x.shape[0] * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(one, tree)


def to_host(tree: PyTree) -> PyTree:
    """Every array as NumPy: its rows in this process, or all of it where each device has it all.

    The inverse of `to_global`, and what reads metrics. Nothing is sent between processes.

    Raises:
        ValueError: if an array is cut along another axis than its rows.
    """
    return jax.tree.map(lambda x: _own(x) if isinstance(x, jax.Array) else x, tree)


def _own(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    blocks = {}
    for shard in x.addressable_shards:
        if shard.data.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"an array of shape {x.shape} is cut along more than its rows; to_host is for "
                "batches and metrics"
            )
        blocks.setdefault(shard.index[0].indices(x.shape[0])[0], shard.data)
    return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(ROWS))
