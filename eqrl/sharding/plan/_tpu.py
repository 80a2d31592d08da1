"""TPU slices by their names in the cloud, described by libtpu on a machine without TPUs."""

import importlib.util
import os
from typing import Any, NamedTuple

from jax.experimental import topologies


class Slice(NamedTuple):
    """What libtpu is asked for.

    Attributes:
        shape: chips along each axis of the slice.
        host: chips of one host along three axes.
        torus: whether the ends of each axis are joined.
    """

    shape: tuple[int, ...]
    host: tuple[int, int, int]
    torus: tuple[bool, ...]


# Chips of a slice, and its shape: of chips with four links and with six.
_FLAT = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}  # fmt: skip
_DEEP = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8),
}  # fmt: skip
# Numbers in names count TensorCores where a chip has two.
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}

# Keeps libtpu from asking the cloud where it is, from writing logs, and from excluding others.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_slices(chip: str) -> dict[str, Slice]:
    """The slices of one kind of chip by name, smallest first."""
    flat = _CORES[chip] == 1
    found = {}
    for chips, shape in (_FLAT if flat else _DEEP).items():
        # Slices of whole cubes (or one whole pod) are wired to a torus.
        torus = tuple(size == 16 if flat else all(n % 4 == 0 for n in shape) for size in shape)
        host = (2, 4, 1) if flat and chips == 8 else (1, 1, 1) if chips == 1 else (2, 2, 1)
        found[f"{chip}-{chips * _CORES[chip]}"] = Slice(shape, host, torus)
    return found


def tpu_devices(chip: str, where: Slice) -> tuple[Any, ...]:
    """The devices of a slice, one a chip, as libtpu describes them.

    Raises:
        ValueError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f'a plan for {chip} needs the TPU compiler, which needs no TPU: pip install "eqrl[tpu]"'
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # read when libtpu is loaded
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip}:{'x'.join(map(str, where.shape))}",
        chips_per_host_bounds=where.host,
        **({"chip_config_name": "megacore"} if chip == "v4" else {}),
    )
    return tuple(described.devices)
