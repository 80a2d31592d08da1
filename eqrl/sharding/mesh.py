"""The devices as a grid with named axes."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from ..models import ROWS


# Copies of everything, with their own rows; parameters cut up, with their own rows; and parts of
# each matrix product, for the same rows.
AXES = ("data", "fsdp", "tensor")


def make_mesh(axes: str, devices=None) -> Mesh:
    """A mesh of the axes `data`, `fsdp` and `tensor`.

    Args:
        axes: `"data=2,fsdp=4"`: sizes of axes, 1 for those not named. One of them may be -1, for
            all devices that are left.
        devices: to use, in their order; all devices of all processes by default.

    Raises:
        ValueError: if an axis does not exist or comes twice, or the sizes do not multiply to the
            number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | _parse(axes)
    known = math.prod(size for size in sizes.values() if size > 0)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    total = math.prod(sizes.values())
    if total != len(devices) or total < 1:
        raise ValueError(
            f"mesh {axes!r} has {known} devices{' or a multiple' if open_axes else ''}, and there "
            f"are {len(devices)}; sizes must multiply to that, or leave one axis at -1"
        )
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES)


def _parse(axes: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, (word.strip() for word in axes.split(","))):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes:
            raise ValueError(
                f"mesh {axes!r}: {part!r} must be one of {', '.join(AXES)} and a size, each once"
            )
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"mesh {axes!r}: the size of {name} must be above 0, or -1")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {axes!r}: only one axis may be -1")
    return sizes


def row_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in ROWS)
