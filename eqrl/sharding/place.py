"""Arrays onto a mesh: parameters by the table of their family, batches by rows."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..models import PARTITION, Architecture, Transformer, units
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
        if not _has_shape(x):
            return None
        return NamedSharding(mesh, partition_spec(path, x.shape, mesh, architecture))

    return jax.tree_util.tree_map_with_path(one, tree)


def placement(mesh: Mesh) -> Callable[[Transformer], PyTree]:
    """How `eqrl.models.load` puts a model onto a mesh: `load(path, place=placement(mesh))`.

    Args:
        mesh: the devices.

    Returns:
        A function from a model, or one of shapes, to the sharding of each of its arrays.
    """
    return lambda model: shardings(model, mesh, model.architecture)


def abstract(tree: Tree, mesh: Mesh, architecture: Architecture) -> Tree:
    """The tree with a `jax.ShapeDtypeStruct` for each array that says where it would lie.

    What `jax.jit(...).lower` takes in place of arrays, for a plan without weights.

    Args:
        tree: of arrays or shapes, such as `eqrl.models.abstract(architecture)` or what
            `eqx.filter_eval_shape(eqrl.init, ...)` makes of it. Anything else in it stays.
        mesh: the devices; they need not be here.
        architecture: of the model.
    """

    def one(path, x):
        if not _has_shape(x):
            return x
        where = NamedSharding(mesh, partition_spec(path, x.shape, mesh, architecture))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, tree)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree from `abstract` on one device; what is no `jax.ShapeDtypeStruct` counts 0."""
    shapes = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in shapes)


def _has_shape(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


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
