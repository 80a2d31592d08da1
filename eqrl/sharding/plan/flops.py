"""FLOPs of a traced program, which a compiler's own count leaves at one pass of each loop."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_flops(jaxpr: ClosedJaxpr | Jaxpr, while_trips: int = 1) -> int:
    """FLOPs of all matrix products and convolutions of a program, over all devices.

    A multiplication and an addition count as two, so `[m, k] @ [k, n]` has 2 m k n. Loops count as
    often as they run, a choice as its dearest branch, recomputation as what it is, a `shard_map`
    for every device, and a Pallas kernel as its body times its grid, with all it might skip.
    Products count in the size they have in the program, before a compiler cuts them over devices.

    Args:
        jaxpr: of the whole program, from `jax.make_jaxpr` or `jax.jit(f).trace(...)`.
        while_trips: how often loops run whose number of passes is known only when they do. Such
            loops inside such loops run once.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of(eqn, while_trips) for eqn in inner.eqns)


def _of(eqn: JaxprEqn, trips: int) -> int:
    params = eqn.params
    match eqn.primitive.name:
        case "dot_general":
            (over, _), _ = params["dimension_numbers"]
            depth = math.prod(_shape(eqn.invars[0])[axis] for axis in over)
            return 2 * math.prod(_shape(eqn.outvars[0])) * depth
        case "conv_general_dilated":
            kernel = _shape(eqn.invars[1])
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // outputs
        case "cond":
            return max(count_flops(branch, trips) for branch in params["branches"])
        case "scan":
            return params["length"] * count_flops(params["jaxpr"], trips)
        case "while":
            return trips * sum(count_flops(params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
        case "shard_map":
            parts = math.prod(params["mesh"].shape[name] for name in params["newly_manual_axes"])
            return parts * count_flops(params["jaxpr"], trips)
        case "pallas_call":
            grid = math.prod(params["grid_mapping"].grid)
            return grid * count_flops(params["jaxpr"], trips)
        case _:
            return sum(count_flops(inner, trips) for inner in _programs(params))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _programs(params: dict) -> Iterator[ClosedJaxpr | Jaxpr]:
    """Programs that an equation calls once: of `jit`, `remat`, custom derivatives and the like."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
