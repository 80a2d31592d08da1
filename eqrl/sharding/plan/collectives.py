"""What one program sends between its devices."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .hlo import Computation, Instruction, size


class Collective(NamedTuple):
    """One exchange of a compiled program, by any of the ways that XLA writes it.

    Attributes:
        kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all`, `collective-permute`,
            `collective-broadcast` or `ragged-all-to-all`.
        bytes: of the whole array on one device, once: the result of a gather, the input of
            everything else.
        groups: which devices exchange with each other, as indices into the flat mesh. Empty if
            all do.
        group_size: devices in a group.
        count: how often one run of the program does this.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    group_size: int
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its runs, with rings: the least that is possible.

        n devices that gather or scatter B bytes send (n - 1) / n B each, and twice that to reduce
        and have the result everywhere.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            share = 1.0 if self.group_size > 1 else 0.0
        else:
            share = (self.group_size - 1) / self.group_size
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1) * self.count


KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def as_collective(instruction: Instruction, input_bytes: int, devices: int) -> Collective | None:
    """What an instruction exchanges; `None` if nothing, or if it only waits for the end of one.

    Args:
        instruction: any.
        input_bytes: of its operands.
        devices: that the program runs on.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = _groups(instruction.attributes, devices)
    count = max((len(group) for group in groups), default=devices)
    output = size(instruction.shape)
    if instruction.opcode == "all-gather-start":
        output -= input_bytes  # it returns its operands as well
    whole = output if kind == "all-gather" else input_bytes
    return Collective(kind, whole, groups, count)


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Devices that exchange: XLA lists them, or cuts a grid of all of them, or names its axes."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _listed(listed[1])
    if grid := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, source = _numbers(grid[1]), _numbers(grid[2])
        order = np.arange(math.prod(source)).reshape(source)
        order = order.transpose(_numbers(grid[3])) if grid[3] else order
        return tuple(map(tuple, order.reshape(shape).tolist()))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        return _of_axes(mesh[1], mesh[2], mesh[3])
    return (tuple(range(devices)),) if devices > 1 else ()


def _of_axes(axes: str, between: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    """Groups along named axes of a grid, or parts of axes: `'a':(2)4` is 4 steps inside 2."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    total = math.prod(sizes.values())
    ids = np.arange(total)
    if given := re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", between + axes):
        numbers = _numbers(given[1])
        if given[2]:
            ids = np.arange(total).reshape(numbers).transpose(_numbers(given[2])).reshape(-1)
        elif math.prod(numbers) != total or len(numbers) == total:
            ids = np.array(numbers)
    shape, inside = [], []
    wanted = {
        name: (int(before), int(part)) if part else None
        for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, n in sizes.items():
        part = wanted.get(name, ()) if name in wanted else ()
        if part is None:
            shape.append(n)
            inside.append(True)
        elif part:
            before, width = part
            shape += [before, width, n // (before * width)]
            inside += [False, True, False]
        else:
            shape.append(n)
            inside.append(False)
    along = [i for i, is_inside in enumerate(inside) if is_inside]
    outside = [i for i, is_inside in enumerate(inside) if not is_inside]
    width = math.prod(shape[i] for i in along)
    grid = ids.reshape(shape).transpose(outside + along).reshape(-1, width)
    return tuple(map(tuple, grid.tolist()))


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def merged(collectives: Sequence[Collective]) -> tuple[Collective, ...]:
    """Equal exchanges as one with the sum of their counts, the most traffic first."""
    key = lambda c: (c.kind, c.bytes, c.groups, c.group_size)  # noqa: E731
    together = itertools.groupby(sorted(collectives, key=key), key)
    found = []
    for (kind, number, groups, count), some in together:
        found.append(Collective(kind, number, groups, count, sum(c.count for c in some)))
    return tuple(sorted(found, key=lambda c: -c.sent))


def is_scattered(shape: str, collective: Collective) -> bool:
    """Whether a fusion that returns this keeps but a share of what it has summed over devices."""
    return (
        collective.kind == "all-reduce"
        and collective.group_size > 1
        and size(shape) * collective.group_size <= collective.bytes
    )


def is_continued(x: Instruction, fused: Computation) -> bool:
    """Whether an exchange has begun in an earlier fusion.

    A TPU's compiler lets an exchange run along with several fusions, and then writes it in each.
    """
    if "chain_id=" not in x.attributes or x.opcode not in KINDS:
        return False
    return not any('"AsyncCollectiveStart"' in y.attributes for y in fused.values())
