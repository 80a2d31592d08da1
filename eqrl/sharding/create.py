"""Trees that are made in their shards: nothing of them ever lies whole on one device."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.core import eval_jaxpr
from jax.sharding import Mesh

from ..models import Architecture
from .place import shardings


Tree = TypeVar("Tree")


def create(make: Callable[[], Tree], mesh: Mesh, architecture: Architecture) -> Tree:
    """What `make` returns, each array cut over the mesh as by `place`, but never whole before.

    `make` is compiled as one program whose results are cut by `partition_spec`: for training
    states, critics and random models. Arrays it closes over, such as the policy, become arguments
    of that program: they are used where they lie, and stay valid.

        state = sharding.create(lambda: eqrl.init(policy, algorithm, optimizer), mesh, facts)

    Args:
        make: without side effects. Arrays it closes over lie on the mesh or were not put anywhere.
        mesh: the devices; if they are those of several processes, all of these must call this.
        architecture: of the model.

    Returns:
        The tree; what is no array in it is as `make` returned it.
    """
    program, arguments, rest = _program(make, mesh, architecture)
    return eqx.combine(program(arguments), rest)


def _program(make: Callable[[], Any], mesh: Mesh, architecture: Architecture):
    """The compiled function of what `make` closes over, those arrays, and what it need not make."""
    traced, shapes, rest = eqx.filter_make_jaxpr(make)()
    tree = jax.tree.structure(shapes)

    def run(arguments):
        return jax.tree.unflatten(tree, eval_jaxpr(traced.jaxpr, arguments))

    return jax.jit(run, out_shardings=shardings(shapes, mesh, architecture)), traced.consts, rest
