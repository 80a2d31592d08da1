"""Bytes of main memory that an instruction of a compiled program reads and writes."""

from .collectives import is_continued
from .hlo import (
    Computation,
    Instruction,
    Program,
    array_size,
    array_stored,
    called,
    parts,
    size,
    stored,
)


def moved_bytes(x: Instruction, inside: Computation) -> int:
    """What an instruction that is no fusion takes and returns; of slices and updates, those.

    Args:
        x: the instruction.
        inside: the computation it is in.
    """
    takes = [stored(inside[name].shape) for name in x.operands if name in inside]
    match x.opcode:
        case "dynamic-slice" | "slice" | "gather":
            read = size(x.shape) if takes[0] else 0
            return read + stored(x.shape) + sum(takes[1:])
        case "dynamic-update-slice":
            return 2 * takes[1]
        case "scatter":
            return sum(takes[1:]) + 2 * takes[-1]
        case "custom-call":
            return sum(takes) + stored(_without_workspace(x.shape))
    if x.opcode.endswith("-start"):
        return _started(x, takes)
    return sum(takes) + stored(x.shape)


def _started(x: Instruction, takes: list[int]) -> int:
    """Of an instruction that runs along with others, and may return operands before its result."""
    if x.opcode in ("slice-start", "dynamic-slice-start"):
        result = parts(x.shape)[len(x.operands)]
        return (array_size(result) if takes[0] else 0) + array_stored(result)
    returned = stored(x.shape)
    return sum(takes) + (max(returned - sum(takes), 0) if x.shape[0] == "(" else returned)


def fused_bytes(x: Instruction, inside: Computation, program: Program) -> int:
    """What a fusion reads of its operands, and what it writes.

    Args:
        x: the fusion.
        inside: the computation it is in.
        program: all of them.
    """
    name = called(x, "calls")[0]
    fused = program.computations[name]
    if any('"AsyncCollectiveDone"' in y.attributes for y in fused.values()):
        return 0
    operands = enumerate(x.operands)
    taken = sum(_read(program, fused, i, inside[operand].shape) for i, operand in operands)
    return taken + _written(program, fused, x.shape)


def _without_workspace(shape: str) -> str:
    """Libraries for GPUs are given room to work in as one more result, a list of bytes."""
    arrays = parts(shape)
    if len(arrays) < 2 or arrays[-1][0] not in ("s8", "u8") or len(arrays[-1][1]) != 1:
        return shape
    return shape[: shape.rindex(arrays[-1][0] + "[")]


def _read(program: Program, fused: Computation, number: int, shape: str) -> int:
    """Bytes that a fusion reads of one operand."""
    whole = stored(shape)
    parameter = fused.parameters.get(number)
    if not whole or parameter is None:
        return whole
    taken, is_returned = _taken(program, fused, parameter.name, whole)
    return whole if is_returned else min(whole, taken)


def _taken(program: Program, fused: Computation, name: str, whole: int) -> tuple[int, bool]:
    """Bytes that users of a value in a fusion read of it, and whether it is returned as it is."""
    total, is_returned = 0, False
    for x in fused.values():
        if name not in x.operands:
            continue
        match x.opcode:
            case "bitcast":
                more, is_last = _taken(program, fused, x.name, whole)
                total, is_returned = total + more, is_returned or is_last or x.is_root
            case "dynamic-slice" | "slice" | "gather" if x.operands[0] == name:
                total += size(x.shape)
            case "dynamic-update-slice" if x.operands[0] == name:
                pass  # what stays is not touched
            case "tuple" if x.is_root:
                pass  # handed through
            case "fusion":
                more, is_last = _taken_within(program, fused, x, name, whole)
                total, is_returned = total + more, is_returned or is_last
            case _:
                total += 0 if is_continued(x, fused) else whole
    return total, is_returned


def _taken_within(
    program: Program, fused: Computation, x: Instruction, name: str, whole: int
) -> tuple[int, bool]:
    """`_taken` of a value that a fusion inside a fusion is given."""
    inner = program.computations[called(x, "calls")[0]]
    total, is_returned = 0, False
    for i, operand in enumerate(x.operands):
        if operand != name:
            continue
        more, is_result = _taken(program, inner, inner.parameters[i].name, whole)
        total += more
        if is_result:  # its users are those of the fusion
            more, is_last = _taken(program, fused, x.name, whole)
            total, is_returned = total + more, is_returned or is_last or x.is_root
    return total, is_returned


def _written(program: Program, fused: Computation, shape: str) -> int:
    """Bytes that a fusion writes: what it returns, except where it updates or hands through."""
    whole = stored(shape)
    root = fused.root
    if root.opcode != "tuple":
        return max(whole - _kept(program, fused, root.name), 0) if whole else 0
    kept = sum(
        stored(fused[name].shape)
        if fused[name].opcode == "parameter"
        else _kept(program, fused, name)
        for name in root.operands
    )
    return max(whole - kept, 0)


def _kept(program: Program, fused: Computation, name: str) -> int:
    """Bytes of a result that are an operand's, in its place."""
    x = fused[name]
    if x.opcode == "bitcast":
        return _kept(program, fused, x.operands[0])
    if x.opcode == "fusion":
        inner = program.computations[called(x, "calls")[0]]
        return 0 if inner.root.opcode == "tuple" else _kept(program, inner, inner.root.name)
    if is_continued(x, fused):
        return stored(x.shape)
    if x.opcode != "dynamic-update-slice":
        return 0
    source = x.operands[0]
    while fused[source].opcode == "bitcast":
        source = fused[source].operands[0]
    if fused[source].opcode != "parameter":
        return 0
    return max(stored(x.shape) - size(fused[x.operands[1]].shape), 0)
