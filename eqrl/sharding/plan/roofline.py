"""Least seconds that a program can take."""

from typing import NamedTuple

from jax.sharding import Mesh

from .collectives import Collective
from .topology import Topology
from .traffic import Traffic


class Seconds(NamedTuple):
    """Of one run of a program, if nothing but one of these took any time.

    Attributes:
        compute: matrix products at the chip's peak.
        memory: reads and writes of main memory at its bandwidth.
        links: exchanges between devices, each at the bandwidth of the slowest link it must take.
        total: the largest of the three, as if each hid the others completely: a lower bound. What
            does not overlap adds up, so a run lies between it and their sum, if peaks were reached.
    """

    compute: float
    memory: float
    links: float
    total: float


def roofline(flops: int, traffic: Traffic, topology: Topology, mesh: Mesh) -> Seconds | None:
    """Seconds from published peaks; `None` where there are none (CPU).

    Args:
        flops: over all devices, which are taken to share them equally.
        traffic: of one device.
        topology: the chips and their links.
        mesh: the devices.

    Source: Williams et al. 2009 (doi:10.1145/1498765.1498785); of rings, Patarasuk and Yuan 2009
    (doi:10.1016/j.jpdc.2008.09.002).
    """
    chip = topology.chip
    if chip.bf16_flops is None or chip.hbm_bytes_per_s is None:
        return None
    compute = flops / mesh.size / chip.bf16_flops
    memory = traffic.hbm_bytes / chip.hbm_bytes_per_s
    links = sum(_exchange(c, topology, mesh) for c in traffic.collectives)
    return Seconds(compute, memory, links, max(compute, memory, links))


def _exchange(c: Collective, topology: Topology, mesh: Mesh) -> float:
    """Seconds of one kind of exchange, all its repetitions."""
    if c.group_size < 2:
        return 0.0
    near, far = topology.link_bytes_per_s, topology.chip.hosts_link_bytes_per_s
    assert near is not None and far is not None
    within = c.sent / near
    devices = mesh.devices.flat
    hosts = {int(devices[i].process_index) for i in c.groups[0]} if c.groups else set()
    # TPUs of a slice have the same links to all neighbours.
    if topology.chip.platform == "tpu" or len(hosts) < 2:
        return within
    together = c.group_size / len(hosts)
    if c.kind in ("collective-permute", "collective-broadcast"):
        return c.sent / far
    if c.kind in ("all-to-all", "ragged-all-to-all"):
        return max(within, c.bytes * c.count * (1 - together / c.group_size) / far)
    # Each host needs what the others have, over the adapters of all its members at once.
    across = c._replace(group_size=len(hosts)).sent / (together * far)
    return max(within if together > 1 else 0.0, across)
