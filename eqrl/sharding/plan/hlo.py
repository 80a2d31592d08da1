"""The text of a compiled program, cut into computations and instructions."""

import functools
import math
import re
from typing import NamedTuple, TypeAlias


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: without `%`.
        shape: text of what it returns, such as `bf16[8,128]{1,0:T(8,128)}`; in parentheses if there
            are several.
        opcode: such as `fusion`.
        operands: names of other instructions of the computation.
        arguments: text between the parentheses, which a constant's value is.
        attributes: text after them.
        is_root: whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(x for x in reversed(self.values()) if x.is_root)

    @property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(x.arguments): x for x in self.values() if x.opcode == "parameter"}


class Program(NamedTuple):
    """All computations by name, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*-> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` returns, of any platform.

    Raises:
        ValueError: if the text has no computation that is run.
    """
    computations: dict[str, Computation] = {}
    current, entry = Computation(), None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            instruction = _instruction(line, found)
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("text has no ENTRY computation; pass what `compiled.as_text()` returns")
    return Program(computations, entry)


def _instruction(line: str, found: re.Match[str]) -> Instruction | None:
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close - 1]
    operands = () if opcode[1] == "constant" else tuple(_NAME.findall(arguments))
    return Instruction(
        found[2], line[start:end], opcode[1], operands, arguments, line[close:], bool(found[1])
    )


def _closing(line: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for mark in _PARENTHESIS.finditer(line, start):
        depth += 1 if mark[0] == "(" else -1
        if depth == 0:
            return mark.end()
    return len(line)


_PARENTHESIS = re.compile(r"[()]")


def called(instruction: Instruction, *keys: str) -> list[str]:
    """Names of the computations that an instruction calls under any of these attributes."""
    found = []
    for key in keys:
        if match := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", instruction.attributes):
            found += _NAME.findall(match[1]) if match[2] is None else [match[2]]
    return found


# --- shapes ---------------------------------------------------------------------------------------

Part: TypeAlias = tuple[str, tuple[int, ...], str]

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "u1": 1, "s1": 1}


@functools.lru_cache(maxsize=65_536)
def parts(shape: str) -> tuple[Part, ...]:
    """Type, sizes and layout of each array in a shape's text."""
    return tuple(
        (kind, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), layout or "")
        for kind, sizes, layout in _SHAPE.findall(shape)
    )


def size(shape: str) -> int:
    """Bytes of all its elements."""
    return sum(map(array_size, parts(shape)))


def stored(shape: str) -> int:
    """Bytes it takes in the chip's main memory: with padding, and without what lies elsewhere.

    A TPU's compiler pads arrays to tiles, `T(8,128)`, and keeps some in memory on the chip, `S(1)`.
    """
    return sum(map(array_stored, parts(shape)))


def array_size(array: Part) -> int:
    """`size` of one array."""
    return _bytes(array[0], math.prod(array[1]))


def array_stored(array: Part) -> int:
    """`stored` of one array."""
    kind, sizes, layout = array
    if re.search(r"S\([1-9]", layout):
        return 0
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile is None or not sizes:
        return array_size(array)
    # The layout lists axes from the one whose neighbours are next to each other.
    padded = [sizes[int(axis)] for axis in order.split(",")]
    for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
        if i < len(padded):
            padded[i] = -(-padded[i] // n) * n
    return _bytes(kind, math.prod(padded))


def _bytes(kind: str, count: int) -> int:
    bits = _BITS.get(kind)
    if bits is None:
        digits = re.search(r"\d+", kind)
        # f8e4m3fn has 8 bits, c64 has 64, bf16 has 16.
        bits = int(digits[0]) if digits else 0
    return -(-bits * count // 8)
