"""Arrays onto a mesh: parameters by the table of their family, batches by rows."""

from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..models import PARTITION, Architecture, units
from .mesh import ROWS


Tree = TypeVar("Tree")


def partition_spec(
    path: tuple, shape: tuple[int, ...], mesh: Mesh, architecture: Architecture
) -> PartitionSpec:
    """What cuts each axis of one array of a model, an optimizer's state, or a gradient.

    The last attribute names of its path are looked up in `eqrl.models.PARTITION`; arrays that are
    not there, such as counters, are whole on every device. So is an axis that its mesh axis does
    not divide, or would divide within an attention head.

    Args:
        path: of the array in its tree, from `jax.tree_util`.
        shape: of the array.
        mesh: the devices.
        architecture: of the model.
    """
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    for length in (3, 2, 1):
        name = ".".join(names[-length:])
        axes = PARTITION.get(name)
        if axes is not None and len(axes) == len(shape):
            return PartitionSpec(
                *(
                    axis if axis and _divides(mesh.shape[axis], size, axis, name, architecture)
                    else None
                    for axis, size in zip(axes, shape, strict=True)
                )
            )  # fmt: skip
    return PartitionSpec()


def _divides(parts: int, size: int, axis: str, name: str, architecture: Architecture) -> bool:
    pieces = units(name, architecture) if axis == "tensor" else None
    return size % parts == 0 and (pieces is None or pieces % parts == 0)


def shardings(tree: PyTree, mesh: Mesh, architecture: Architecture) -> PyTree:
    """The sharding of each array of a model or a training state, from shapes alone."""

    def one(path, x):
        if not eqx.is_array(x) and not isinstance(x, jax.ShapeDtypeStruct):
            return None
        return NamedSharding(mesh, partition_spec(path, x.shape, mesh, architecture))

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: Tree, mesh: Mesh, architecture: Architecture) -> Tree:
    """A model or a training state with each array cut over the mesh; see `partition_spec`."""

    def one(path, x):
        if not eqx.is_array(x):
            return x
        spec = partition_spec(path, x.shape, mesh, architecture)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def place_rows(tree: Tree, mesh: Mesh) -> Tree:
    """A batch with its rows spread over `data` and `fsdp`.

    Raises:
        ValueError: if rows do not divide among the devices; pad them with `eqrl.pad_rows`.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda x: jax.device_put(x, sharding) if eqx.is_array(x) else x, tree)
