"""What a compiled program moves in main memory and between devices, loops multiplied out."""

from collections.abc import Sequence
from typing import NamedTuple

from .collectives import Collective, as_collective, is_continued, is_scattered, merged
from .hlo import Computation, Instruction, Program, called, parse, size
from .memory import fused_bytes, moved_bytes
from .trips import known_trips


class Traffic(NamedTuple):
    """Of one run of a program, on one device.

    Attributes:
        hbm_bytes: read from and written to main memory, counted at the borders of fusions: what an
            instruction takes and what it returns. Of an array that it only slices or updates, the
            slice or twice the update. Kernels count their arguments and results once.
        collectives: with how often each happens, the most traffic first.
    """

    hbm_bytes: int
    collectives: tuple[Collective, ...]


def read_traffic(text: str, devices: int, while_trips: int = 1) -> Traffic:
    """Reads the optimized text of a program: of a CPU, a TPU or a GPU.

    Args:
        text: `compiled.as_text()`.
        devices: that it runs on.
        while_trips: how often loops run of which the text does not tell. Such loops inside such
            loops run once.

    Raises:
        ValueError: if the text is no program's.
    """
    program = parse(text)
    total = _Walk(program, devices).computation(program.entry, while_trips)
    return Traffic(total.bytes, merged(total.collectives))


class _Cost(NamedTuple):
    bytes: int = 0
    collectives: tuple[Collective, ...] = ()

    def times(self, count: int) -> "_Cost":
        more = tuple(c._replace(count=c.count * count) for c in self.collectives)
        return _Cost(self.bytes * count, more)


def _sum(costs: Sequence[_Cost]) -> _Cost:
    return _Cost(sum(c.bytes for c in costs), tuple(x for c in costs for x in c.collectives))


# They name bytes that are there, or wait for an instruction that has been counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "domain", "add-dependency", "async-update",
}  # fmt: skip
_NOTHING = ('"AllocateBuffer"', '"Sharding"', '"SPMDFullToShardShape"', '"SPMDShardToFullShape"')


class _Walk:
    """Adds up computations from the inside out, each once."""

    def __init__(self, program: Program, devices: int):
        self.program = program
        self.devices = devices
        self.known: dict[tuple[str, int], _Cost] = {}

    def computation(self, name: str, trips: int) -> _Cost:
        if (name, trips) not in self.known:
            inside = self.program.computations[name]
            costs = [self.instruction(x, inside, trips) for x in inside.values()]
            self.known[name, trips] = _sum(costs)
        return self.known[name, trips]

    def instruction(self, x: Instruction, inside: Computation, trips: int) -> _Cost:
        if x.opcode in _FREE or x.opcode.endswith("-done"):
            return _Cost()
        match x.opcode:
            case "while":
                count = known_trips(x, inside, self.program)
                within = trips if count is not None else 1
                parts = [self.computation(name, within) for name in called(x, "body", "condition")]
                return _sum(parts).times(trips if count is None else count)
            case "conditional":
                keys = "branch_computations", "true_computation", "false_computation"
                branches = [self.computation(name, trips) for name in called(x, *keys)]
                return max(branches, key=lambda cost: cost.bytes)
            case "call" | "async-start":
                return self.computation(called(x, "to_apply", "calls")[0], trips)
            case "fusion":
                return self.fusion(x, inside)
            case "custom-call" if any(target in x.attributes for target in _NOTHING):
                return _Cost()
        exchanged = as_collective(x, _input_bytes(x, inside), self.devices)
        return _Cost(moved_bytes(x, inside), () if exchanged is None else (exchanged,))

    def fusion(self, x: Instruction, inside: Computation) -> _Cost:
        exchanged = tuple(
            c._replace(kind="reduce-scatter") if is_scattered(x.shape, c) else c
            for c in self.collectives_in(called(x, "calls")[0])
        )
        return _Cost(fused_bytes(x, inside, self.program), exchanged)

    def collectives_in(self, name: str) -> list[Collective]:
        """Exchanges that begin inside a fusion, or in fusions inside it."""
        inside = self.program.computations[name]
        found = []
        for x in inside.values():
            if x.opcode in ("fusion", "call", "async-start"):
                for inner in called(x, "calls", "to_apply"):
                    found += self.collectives_in(inner)
            elif not is_continued(x, inside):
                c = as_collective(x, _input_bytes(x, inside), self.devices)
                found += [] if c is None else [c]
        return found


def _input_bytes(x: Instruction, inside: Computation) -> int:
    return sum(size(inside[name].shape) for name in x.operands if name in inside)
