"""Devices that programs are compiled for, whether or not they are here."""

import contextlib
import dataclasses
import difflib
import math
import os
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh

from ._gpu import PER_HOST, gpu_counts, gpu_devices
from ._tpu import Slice, tpu_devices, tpu_slices
from .chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips and how they are joined.

    Attributes:
        name: what it was asked for by.
        chip: what one of them can do.
        devices: of type `jax.Device`, one a chip; to be given to `make_mesh`.
        hosts: machines that hold them.
        link_bytes_per_s: what a chip can send within the slice (of TPUs) or host (of GPUs), a
            second, in one direction: of a TPU, over those of its links that a chip in the corner
            of this slice has connected. `None` if not known.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    hosts: int
    link_bytes_per_s: float | None

    def tracing(self, mesh: Mesh) -> AbstractContextManager[None]:
        """In it, programs are traced and lowered for these chips: `with topology.tracing(mesh):`.

        Kernels see the kind of chip and choose their tiles for it, and constraints on activations
        see the mesh, as under `jax.set_mesh(mesh)`, which needs not be set.

        Args:
            mesh: of (some of) `devices`.
        """
        # A mesh knows the kind of its devices, and so does its abstract mesh.
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def topology(name: str) -> Topology:
    """Chips by the name under which one rents them.

    Nothing of it needs to be here: programs are compiled for it on any machine.

    Args:
        name: `v4-8`, `v5p-16` (the number counts TensorCores, two a chip), `v5e-8` (or
            `v5litepod-8`), `v6e-16` (it counts chips), `h100-8`, `h200-64` (GPUs, eight a host).

    Raises:
        ValueError: if there is no such name, or the compiler for it is not installed.
    """
    slices = {n: (c, s) for c in ("v4", "v5e", "v5p", "v6e") for n, s in tpu_slices(c).items()}
    gpus = {n: (c, count) for c in ("h100", "h200") for n, count in gpu_counts(c).items()}
    word = name.strip().lower().replace("v5litepod-", "v5e-")
    if word in slices:
        chip, where = slices[word]
        devices = tpu_devices(chip, where)
        hosts = math.prod(where.shape) // math.prod(where.host)
        return Topology(name, CHIPS[chip], devices, hosts, _link_rate(CHIPS[chip], where))
    if word in gpus:
        chip, count = gpus[word]
        devices = gpu_devices(chip, count)
        hosts = -(-count // PER_HOST)
        return Topology(name, CHIPS[chip], devices, hosts, CHIPS[chip].link_bytes_per_s)
    raise ValueError(f"topology {name!r} does not exist; {_nearest(word, [*slices, *gpus])}")


def here() -> Topology:
    """The devices of this machine, or of all processes that run together.

    A CPU has its share of the machine's memory as capacity, and no peaks.
    """
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    hosts = len({device.process_index for device in devices})
    matching = [chip for chip in CHIPS.values() if kind.startswith(chip.device_kind)]
    if devices[0].platform != "cpu" and matching:
        # "TPU v5" is the beginning of "TPU v5 lite".
        chip = max(matching, key=lambda chip: len(chip.device_kind))
        own = _own_memory(jax.local_devices()[0]) or chip.hbm_bytes
        chip = dataclasses.replace(chip, hbm_bytes=min(own, chip.hbm_bytes))
        return Topology("here", chip, devices, hosts, chip.link_bytes_per_s)
    local = jax.local_device_count()
    capacity = _own_memory(jax.local_devices()[0]) or _physical_memory() // local
    chip = Chip(
        kind, kind, devices[0].platform, capacity, None, None, None, 1, None, "this machine"
    )
    return Topology("here", chip, devices, hosts, None)


def _link_rate(chip: Chip, where: Slice) -> float:
    """Of a chip in the corner of a slice: a link along each axis, and two where it is a ring."""
    links = sum(
        0 if size == 1 else 2 if torus else 1
        for size, torus in zip(where.shape, where.torus, strict=True)
    )
    assert chip.link_bytes_per_s is not None
    return chip.link_bytes_per_s * links / chip.ports


def _nearest(word: str, names: list[str]) -> str:
    """The closest name: of the same chip if there is one, then by number."""
    chip, _, number = word.rpartition("-")
    same = [name for name in names if name.rpartition("-")[0] == chip]
    if same and number.isdigit():
        best = min(same, key=lambda name: abs(int(name.rpartition("-")[2]) - int(number)))
        return f"the nearest is {best}"
    close = difflib.get_close_matches(word, names, 1, 0.0)
    chips = dict.fromkeys(name.rpartition("-")[0] for name in names)
    return f"the nearest is {close[0]}, and chips are {', '.join(chips)}"


def _own_memory(device: Any) -> int | None:
    stats = None
    with contextlib.suppress(jax.errors.JaxRuntimeError, NotImplementedError):
        stats = device.memory_stats()
    return (stats or {}).get("bytes_limit")


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
