"""How often a loop of a compiled program runs, where its text tells."""

import re

from .hlo import Computation, Instruction, Program, called


def known_trips(loop: Instruction, inside: Computation, program: Program) -> int | None:
    """The number of passes of a `while`, or `None`.

    The compilers of CPU and GPU write it down. A TPU's does not: there it follows from a condition
    `i < n` on a counter that starts at a constant and grows by a constant in each pass.

    Args:
        loop: the `while`.
        inside: the computation it is in.
        program: all of them.
    """
    if written := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(written[1])
    condition = program.computations[called(loop, "condition")[0]]
    body = program.computations[called(loop, "body")[0]]
    compare = _compare(condition, program)
    if compare is None:
        return None
    index, limit, is_strict = compare
    start = _start(loop, inside, index)
    step = _step(body, program, index)
    if isinstance(limit, str):
        limit = _start(loop, inside, int(limit))
    if start is None or limit is None or not step:
        return None
    return max(-(-(limit - start + (0 if is_strict else 1)) // step), 0)


def _compare(condition: Computation, program: Program) -> tuple[int, int | str, bool] | None:
    """Which element of the loop's state is compared, with what, and whether it must be smaller.

    The limit is a number, or as a string the index of another element.
    """
    root, scope = condition.root, condition
    names = list(root.operands)
    if root.opcode == "fusion":
        scope = program.computations[called(root, "calls")[0]]
        outer = {number: names[number] for number in range(len(names))}
        root = scope.root
        inner = {x.name: outer[number] for number, x in scope.parameters.items()}
        sides = [inner.get(_source(scope, name), name) for name in root.operands]
    else:
        sides = list(root.operands)
    if root.opcode != "compare" or "direction=L" not in root.attributes:
        return None
    is_strict = "direction=LT" in root.attributes
    first, second = (_value(condition, scope, side) for side in sides)
    if not isinstance(first, str) or second is None:
        return None
    return int(first), second, is_strict


def _value(condition: Computation, scope: Computation, name: str) -> int | str | None:
    """A constant's number, or as a string the index of an element of the loop's state."""
    where = condition if name in condition else scope
    x = where[_source(where, name)]
    if x.opcode == "constant":
        return _integer(x)
    if x.opcode == "get-tuple-element":
        found = re.search(r"index=(\d+)", x.attributes)
        return found[1] if found else None
    return None


def _start(loop: Instruction, inside: Computation, index: int) -> int | None:
    """The constant that an element of the loop's state begins with."""
    state = inside.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    x = inside.get(_source(inside, state.operands[index]))
    return _integer(x) if x is not None and x.opcode == "constant" else None


def _step(body: Computation, program: Program, index: int) -> int | None:
    """What a pass adds to an element of the loop's state."""
    root = body.root
    if root.opcode != "tuple":
        return None
    x, scope = body[_source(body, root.operands[index])], body
    if x.opcode == "fusion":
        scope = program.computations[called(x, "calls")[0]]
        x = scope.root
    if x.opcode != "add":
        return None
    values = [scope[_source(scope, name)] for name in x.operands]
    constants = [_integer(v) for v in values if v.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None


def _source(inside: Computation, name: str) -> str:
    """Where a copied value comes from."""
    while name in inside and inside[name].opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        name = inside[name].operands[0]
    return name


def _integer(x: Instruction) -> int | None:
    return int(x.arguments) if re.fullmatch(r"-?\d+", x.arguments) else None
