"""What a run would take, before it is paid for: `--dry-run` (here) and `--plan v6e-8` (anywhere).

The programs of a step are compiled for the devices that are asked about, from shapes alone: no
weights, no data, no hub, and for `--plan` no such device either.
"""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from config import Config, batch_plan
from layout import implementation_for
from shapes import Shapes, key_on, shapes_of

import eqrl
from eqrl import models, samplers, sharding
from eqrl.sharding import plan as planner


GIB = 2**30
# Sizes tried in search of the largest micro-batch, and what of a device's memory they may use: they
# are compiled quickly, with memory that is some percent off.
TRIES, MARGIN = 4, 0.92


def plan(config: Config, model_folder: str) -> int:
    """Prints a block for each program and what they come to. Returns the exit status: 0 if all fit.

    Args:
        config: resolved, with `plan`.
        model_folder: folder, file or hub id of the model; only its architecture is read.

    Raises:
        ValueError: if the topology, the model or the mesh is not known.
    """
    start = time.perf_counter()
    if config.plan != "here":
        # What is asked about need not be here, and programs for it are not read back from a cache.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
    topology = planner.here() if config.plan == "here" else planner.topology(config.plan)
    shapes = shapes_of(config, topology, models.architecture_of(model_folder))
    print(_heading(shapes), flush=True)
    programs = []
    for program in _programs(shapes):
        programs.append(program)
        print(f"\n{program}", flush=True)
    print(f"\n{_summary(shapes, programs)}", flush=True)
    fits = all(program.fits for program in programs)
    print(f"\n{_advice(shapes, programs)}")
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    return 0 if fits else 1


def _programs(shapes: Shapes) -> Iterator[planner.ProgramPlan]:
    """The programs of a step in their order."""
    if shapes.samples_here:
        if shapes.moved:
            yield _gather(shapes)
        yield _sample(shapes, "prefill", max_tokens=1)
        yield _sample(shapes, "decode", max_tokens=shapes.config.rollout.max_tokens)
    if shapes.required:
        yield _annotate(shapes)
    yield _update(shapes, shapes.micro_rows)


# --- programs -------------------------------------------------------------------------------------


def _gather(shapes: Shapes) -> planner.ProgramPlan:
    """The copy of the weights for sampling; its programs, one an array, as one."""
    leaves = jax.tree.leaves(shapes.state.policy)
    into = jax.tree.leaves(shapes.cut(shapes.sampling_mesh))
    held = shapes.held
    parts = [
        planner.plan_program(
            "weights for sampling",
            sharding.resharding(where),
            (x,),
            topology=shapes.topology,
            mesh=shapes.mesh,
            resident_bytes=held - sharding.device_bytes(x),
        )
        for x, where in zip(leaves, into, strict=True)
    ]
    return planner.in_turn(parts)


def _sample(shapes: Shapes, name: str, max_tokens: int) -> planner.ProgramPlan:
    mesh, config = shapes.sampling_mesh, shapes.config
    policy = shapes.state.policy
    resident = shapes.held
    if shapes.moved:
        policy = sharding.abstract(policy, mesh, shapes.architecture)
    else:
        resident -= sharding.device_bytes(policy)
    sampler, sampling = samplers.Decoder(), shapes.sampling(max_tokens)
    prompts = shapes.prompts(shapes.pass_prompts, mesh)
    return planner.plan_program(
        name,
        jax.jit(lambda policy, prompts, key: sampler(policy, prompts, sampling, key=key)),
        (policy, prompts, key_on(mesh)),
        topology=shapes.topology,
        mesh=mesh,
        resident_bytes=resident,
        while_trips=max_tokens,
        calls=-(-config.rollout.prompts // shapes.pass_prompts),
    )


def _annotate(shapes: Shapes) -> planner.ProgramPlan:
    required, config = shapes.required, shapes.config
    micro = shapes.micro_rows
    rollout = shapes.rollout()
    rows = rollout.tokens.shape[0]
    own = (shapes.state.policy, shapes.reference, shapes.state.critic)

    def annotate(policy, reference, critic, rollout):
        return eqrl.annotate(
            rollout,
            required,
            policy=policy,
            reference=reference,
            critic=critic,
            temperature=config.rollout.temperature,
            implementation=implementation_for(config, shapes.mesh, shapes.topology.chip.platform),
            micro_batch=min(micro * sharding.row_shards(shapes.mesh), rows),
            buffer=shapes.buffer(micro),
        )

    return planner.plan_program(
        "/".join(sorted(name.removesuffix("_logprobs") for name in required)),
        jax.jit(annotate),
        (*own, rollout),
        topology=shapes.topology,
        mesh=shapes.mesh,
        resident_bytes=shapes.held - sharding.device_bytes(own),
    )


def _update(shapes: Shapes, micro: int, *, quick: bool = False) -> planner.ProgramPlan:
    """The optimizer step with `micro` rows of each device in a backward pass."""
    config = shapes.config
    implementation = implementation_for(config, shapes.mesh, shapes.topology.chip.platform)

    def update(state, batch):
        return eqrl.update(
            state,
            batch,
            shapes.algorithm,
            shapes.optimizer,
            temperature=config.rollout.temperature,
            implementation=implementation,
            micro_batch=micro * sharding.row_shards(shapes.mesh),
            buffer=shapes.buffer(micro),
            remat=config.optim.remat,
        )

    return planner.plan_program(
        "update",
        jax.jit(update, donate_argnums=0),
        (shapes.state, shapes.minibatch()),
        topology=shapes.topology,
        mesh=shapes.mesh,
        resident_bytes=sharding.device_bytes(shapes.reference),
        calls=batch_plan(config).updates_per_step,
        quick=quick,
    )


# --- words ----------------------------------------------------------------------------------------


def _heading(shapes: Shapes) -> str:
    config, topology, facts = shapes.config, shapes.topology, shapes.architecture
    batch = batch_plan(config, row_shards=sharding.row_shards(shapes.mesh))
    sizes = lambda mesh: ",".join(f"{n}={s}" for n, s in mesh.shape.items() if s > 1) or "1"  # noqa: E731
    own = f", weights while sampling {sizes(shapes.sampling_mesh)}" if shapes.moved else ""
    if config.mesh is None and config.plan != "here":
        own += " (the run needs --mesh auto for this)"
    passes = -(-batch.prompts_per_step // shapes.pass_prompts)
    chip = topology.chip
    peaks = "no published peaks"
    if chip.bf16_flops is not None and chip.hbm_bytes_per_s is not None:
        peaks = (
            f"{chip.bf16_flops / 1e12:.0f} TFLOP/s and {chip.hbm_bytes_per_s / 1e9:.0f} GB/s "
            f"({chip.source})"
        )
    return (
        f"{config.model} ({facts.family}, {facts.num_layers} layers of width {facts.width}, "
        f"{config.dtype}), {config.algo.name}\n"
        f"on {topology.name}: {len(topology.devices)} x {chip.name}, hosts: {topology.hosts}; "
        f"{chip.hbm_bytes / GIB:.2f} GiB each, {peaks}\n"
        f"{shapes.meshes.why or 'mesh ' + sizes(shapes.mesh)}{own}\n"
        f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples of "
        f"{config.data.max_prompt_tokens} + {config.rollout.max_tokens} tokens; "
        f"{passes} rollout passes of {shapes.pass_prompts} prompts; "
        f"{batch.updates_per_step} updates of {batch.accumulation_steps} micro-batches of "
        f"{batch.micro_batch_sequences_per_device} sequences a device"
        f"{', layers recomputed' if config.optim.remat else ''}"
    )


def _summary(shapes: Shapes, programs: list[planner.ProgramPlan]) -> str:
    """Least time of a step, and what was not built."""
    lines = [f"not built: {_logits(shapes)}"]
    if not shapes.samples_here:
        lines.append(f"sampling is not in here: {shapes.config.rollout.backend} does it elsewhere")
    if all(program.seconds is not None for program in programs):
        # Prefill is in the decode program as well.
        parts = {p.name: p.calls * p.seconds.total for p in programs if p.name != "prefill"}  # type: ignore
        step = sum(parts.values())
        tokens = batch_plan(shapes.config).sequences_per_step * shapes.config.rollout.max_tokens
        shares = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
        lines.append(
            f"a step takes at least {step:.2f} s ({shares}) if every completion runs to its end: "
            f"at most {tokens / step:,.0f} tokens per second"
        )
    return "\n".join(lines)


def _logits(shapes: Shapes) -> str:
    """What logits of every position would take, which no program here keeps."""
    config, vocab = shapes.config, shapes.architecture.vocab_size
    width = jnp.dtype(config.dtype).itemsize
    prompts = shapes.pass_prompts // sharding.row_shards(shapes.sampling_mesh)
    samples = config.rollout.samples
    prefill = prompts * samples * config.data.max_prompt_tokens * vocab * width
    length = config.data.max_prompt_tokens + config.rollout.max_tokens
    update = shapes.micro_rows * length * vocab * 4
    return (
        f"logits of all prompt tokens of a pass ({prefill / GIB:.2f} GiB a device) and of all "
        f"tokens of a micro-batch in float32 ({update / GIB:.2f} GiB)"
    )


def _advice(shapes: Shapes, programs: list[planner.ProgramPlan]) -> str:
    """The largest micro-batch, and which knob helps what does not fit."""
    lines = []
    for program in programs:
        if not program.fits and program.name != "update":
            lines.append(f"{program.name} does not fit: {_knob(shapes, program)}")
    update = programs[-1]
    asked = shapes.micro_rows
    rows = batch_plan(shapes.config).minibatch_sequences
    high = -(-rows // sharding.row_shards(shapes.mesh))

    def spare(micro: int) -> int:
        if micro == asked:
            return update.capacity - update.hbm_bytes
        program = _update(shapes, micro, quick=True)
        return int(MARGIN * program.capacity) - program.hbm_bytes

    largest = planner.search(spare, asked if update.fits else 1, high, tries=TRIES)
    if largest is None:
        lines.append(f"update does not fit with one sequence a device: {_knob(shapes, update)}")
    else:
        most = " (the whole minibatch)" if largest == high else ""
        lines.append(
            f"largest micro-batch that fits: {largest} sequences a device, "
            f"--optim.micro-batch-per-device {largest}{most}"
        )
    verdict = "everything fits" if all(p.fits for p in programs) else "the run does not fit"
    return "\n".join([*lines, verdict])


def _knob(shapes: Shapes, program: planner.ProgramPlan) -> str:
    """What to change, in the order in which it costs."""
    config = shapes.config
    if program.name in ("prefill", "decode"):
        per_row = (program.temporary_bytes + program.output_bytes) / max(shapes.pass_prompts, 1)
        room = program.capacity - program.argument_bytes - program.resident_bytes
        shards = sharding.row_shards(shapes.sampling_mesh)
        if room > 0 and shapes.pass_prompts > shards:
            prompts = max(int(room / max(per_row, 1)) // shards, 1) * shards
            passes = -(-config.rollout.prompts // prompts)
            return f"try --rollout.passes {max(passes, batch_plan(config).rollout_passes + 1)}"
        return "cut the weights while sampling, for instance --mesh fsdp=-1/tensor=2,data=-1"
    if program.name == "update" and not config.optim.remat:
        return "try --optim.remat"
    return "cut the state further (--mesh fsdp=-1), or take more devices"
