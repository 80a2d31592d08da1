"""One program of a run, compiled for chips that need not be here: memory, work and least time."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh

from ..place import device_bytes
from .collectives import Collective
from .flops import count_flops
from .roofline import Seconds, roofline
from .topology import Topology
from .traffic import read_traffic


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What one run of a program takes; bytes are of one device.

    Attributes:
        name: for people.
        devices: that it runs on.
        calls: how often a training step runs it; nothing here is multiplied by it.
        capacity: bytes of memory a program may use.
        argument_bytes: of what it is given.
        output_bytes: of what it returns.
        alias_bytes: of results that are in the memory of an argument, and so counted twice above.
        temporary_bytes: of what it needs in between.
        code_bytes: of the program itself.
        resident_bytes: of arrays that are in memory as well while it runs.
        flops: of its matrix products, over all devices.
        bytes: that it reads from and writes to memory; `None` if the compiler gave up.
        collectives: what it sends between devices.
        seconds: lower bounds from published peaks; `None` where there are none, or the compiler
            gave up for want of memory.
    """

    name: str
    devices: int
    calls: int
    capacity: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    resident_bytes: int
    flops: int
    bytes: int | None = None
    collectives: tuple[Collective, ...] = ()
    seconds: Seconds | None = None

    @property
    def hbm_bytes(self) -> int:
        """Memory it needs: arguments, results that are not in their place, and all the rest."""
        own = self.argument_bytes + self.output_bytes - self.alias_bytes
        return own + self.temporary_bytes + self.code_bytes + self.resident_bytes

    @property
    def fits(self) -> bool:
        """Whether that is not more than there is."""
        return self.hbm_bytes <= self.capacity

    @property
    def over_bytes(self) -> int:
        """How much is missing; 0 if it fits."""
        return max(self.hbm_bytes - self.capacity, 0)

    def __str__(self) -> str:
        times = f" x {self.calls}" if self.calls != 1 else ""
        lines = [f"{self.name}{times}", f"  HBM      {_memory(self)}", f"  work     {_work(self)}"]
        if self.bytes is not None:
            lines.append(f"  sends    {_sends(self.collectives)}")
        if self.seconds is not None:
            s = self.seconds
            parts = f"compute {_time(s.compute)}, memory {_time(s.memory)}, links {_time(s.links)}"
            lines.append(f"  at least {_time(s.total)}: the largest of {parts}")
        return "\n".join(lines)


def plan_program(
    name: str,
    function: Any,
    args: tuple,
    *,
    topology: Topology,
    mesh: Mesh,
    resident_bytes: int = 0,
    while_trips: int | None = None,
    calls: int = 1,
    quick: bool = False,
) -> ProgramPlan:
    """Traces, lowers and compiles a program for a topology, and reads what came out.

    Nothing is run and no array of `args` exists. A program that a TPU's compiler refuses for want
    of memory gives a plan that does not fit, with the bytes that it says are needed.

    Args:
        name: for people.
        function: from `jax.jit` or `eqx.filter_jit`; what it donates is donated here.
        args: its positional arguments, with a `jax.ShapeDtypeStruct` that has a sharding for each
            array.
        topology: what to compile for.
        mesh: of its devices, which is set while the program is traced.
        resident_bytes: on one device, of arrays that stay in memory beside the program's own: the
            optimizer's state during a rollout, for instance.
        while_trips: how often loops run that end when their data says so: of a decoder, its
            `max_tokens`. Once by default.
        calls: how often a training step runs it; only noted.
        quick: let the compiler try less: a third of its time for a TPU, and another program than
            the one that would run, with memory that is some percent off.

    Raises:
        ValueError: if an array has no sharding.
    """
    _check_shardings(args)
    trips = 1 if while_trips is None else while_trips
    with topology.tracing(mesh):
        traced = _trace(function, args)
        flops = count_flops(traced.jaxpr, trips)
        lowered = traced.lower()
        facts: dict[str, Any] = dict(
            name=name, devices=mesh.size, calls=calls, capacity=topology.chip.hbm_bytes,
            resident_bytes=resident_bytes, flops=flops,
        )  # fmt: skip
        try:
            with _trying_less() if quick else contextlib.nullcontext():
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            return _refused(facts, args, needed)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    traffic = read_traffic(text, mesh.size, trips)
    return ProgramPlan(
        **facts,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        bytes=traffic.hbm_bytes,
        collectives=traffic.collectives,
        seconds=roofline(flops, traffic, topology, mesh),
    )


def in_turn(programs: Sequence[ProgramPlan]) -> ProgramPlan:
    """Programs that run one after the other, whose results all stay, as one.

    Args:
        programs: of the same topology; `resident_bytes` of each are without the others' results.

    Returns:
        Memory when the most is in use, and the sums of work and time, under the first one's name.
    """
    stay, needs = 0, []
    for program in programs:
        needs.append(dataclasses.replace(program, resident_bytes=program.resident_bytes + stay))
        stay += program.output_bytes - program.alias_bytes
    known = all(p.bytes is not None for p in programs)
    timed = [p.seconds for p in programs if p.seconds is not None]
    return dataclasses.replace(
        max(needs, key=lambda p: p.hbm_bytes),
        name=programs[0].name,
        flops=sum(p.flops for p in programs),
        bytes=sum(p.bytes or 0 for p in programs) if known else None,
        collectives=tuple(c for p in programs for c in p.collectives),
        seconds=Seconds(*map(sum, zip(*timed, strict=True))) if timed else None,
    )


def needed_bytes(message: str) -> int | None:
    """Bytes of HBM that a program needs, from the message of the compiler that refused it.

    Args:
        message: of the error.

    Returns:
        `None` if the message is of something else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    ):
        if found := re.search(pattern, message):
            power = " KMGT".index(found[2] or " ")
            return int(float(found[1]) * 1024**power)
    return None


@contextlib.contextmanager
def _trying_less() -> Iterator[None]:
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O1")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def _check_shardings(args: tuple) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"args{where} has no sharding; give each ShapeDtypeStruct one")


def _is_array(x) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _trace(function, args: tuple) -> Any:
    """What `jax.jit(...).trace` returns, also for functions of `eqx.filter_jit`.

    Those take a ShapeDtypeStruct for something static, so arrays are told from the rest here.
    """
    if hasattr(function, "trace"):
        return function.trace(*args)
    arrays, static = eqx.partition(args, _is_array)
    donated = [function.donate_first, function.donate_rest]

    def run(first, rest):
        return eqx.filter(function(*eqx.combine((first, *rest), static)), eqx.is_array)

    run.__name__ = getattr(function, "__name__", "run")
    jitted = jax.jit(run, donate_argnums=[i for i, is_donated in enumerate(donated) if is_donated])
    return jitted.trace(arrays[0], arrays[1:])


def _refused(facts: dict[str, Any], args: tuple, needed: int) -> ProgramPlan:
    """The plan of a program that was not compiled: its arguments, and all else as temporaries."""
    given = device_bytes(args)
    return ProgramPlan(
        **facts, argument_bytes=given, output_bytes=0, alias_bytes=0, code_bytes=0,
        temporary_bytes=max(needed - given, 0),
    )  # fmt: skip


# --- text -----------------------------------------------------------------------------------------


def _memory(plan: ProgramPlan) -> str:
    parts = {
        "arguments": plan.argument_bytes,
        "results": plan.output_bytes - plan.alias_bytes,
        "temporaries": plan.temporary_bytes,
        "resident": plan.resident_bytes,
    }
    listed = ", ".join(f"{word} {_gib(number)}" for word, number in parts.items() if number > 0)
    verdict = "fits" if plan.fits else f"does not fit by {_gib(plan.over_bytes)} GiB"
    return f"{_gib(plan.hbm_bytes)} of {_gib(plan.capacity)} GiB: {verdict} ({listed})"


def _work(plan: ProgramPlan) -> str:
    work = f"{plan.flops / plan.devices / 1e12:,.3g} TFLOP"
    if plan.bytes is not None:
        work += f", {plan.bytes / 1e9:,.3g} GB of memory read and written"
    return work + " a device"


def _sends(collectives: tuple[Collective, ...]) -> str:
    kinds: dict[str, list[Collective]] = {}
    for c in collectives:
        kinds.setdefault(c.kind, []).append(c)
    words = []
    for kind, some in kinds.items():
        times, sent = sum(c.count for c in some), sum(c.sent for c in some)
        words.append(f"{kind} {times:,} times, {sent / 1e9:,.3g} GB")
    return "; ".join(words) or "nothing"


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"
