"""The loop that every example runs: sample, reward, assign, update; evaluate, save, draw.

`train(config, build)` reads top to bottom. The parts that carry an algorithm are eqrl's; what is
here is order, files and numbers; one step is in `stepping.py`.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import evaluation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import planning
import spread
from asking import Ahead
from backends import check_backend, running, sampler_for
from config import Config, build_algorithm, build_optimizer, derived, describe, parse
from layout import (
    Meshes,
    choose_meshes,
    implementation_for,
    set_mesh,
    state_shapes,
    stated_mesh,
)
from stepping import Run, batch_on, collect, learn
from task import Task

import eqrl
from eqrl import data, models, rewards, samplers, sharding, tracking
from eqrl.checkpoint import Checkpoints, Resume


DEMO = pathlib.Path(__file__).parent / "demo_model"


def main(build: Callable[[Any], Task], cls: type[Config] = Config) -> int:
    """A script: reads the command line, and prints the configuration or trains.

    Args:
        build: see `train`.
        cls: with flags of the script's own.
    """
    config = parse(cls=cls)
    if config.print_config:
        print(describe(config), end="")
        return 0
    return train(config, build)


def train(config: Config, build: Callable[[Any], Task]) -> int:
    """Trains, and leaves a run folder that tells the story. Returns the process's exit code.

    Args:
        config: resolved.
        build: makes the task from it; data is loaded inside, so that its faults are recorded too.

    Raises:
        SystemExit: with one sentence, if something that the configuration names does not work.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # transformers warns that PyTorch is missing; nothing here uses it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _cache_compilations()
    if config.plan:
        try:
            return planning.plan(config, _source(config))
        except ValueError as error:  # 1 is the answer "does not fit"
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    with _one_sentence():
        processes = spread.start(config)
    with sharding.together(processes), spread.only_first_prints():
        return _run(config, build)


def _run(config: Config, build: Callable[[Any], Task]) -> int:
    with _one_sentence():
        config, resume = spread.alike(config)
    folder = pathlib.Path(str(config.run_dir))
    with (
        tracking.exit_status(folder if sharding.is_first() else None) as status,
        tracking.StopRequest() as stop,
    ):
        with _one_sentence():
            run, policy = _prepare(config, build(config), folder, resume)
            state, stream, counters, rows = _begin(run, policy, resume)
            del policy  # the state has its own
        status.step = 0 if resume is None else resume.step
        ahead = Ahead(config.rollout.overlap, config.steps or 0, rows)
        with set_mesh(run.meshes.train), running(run.sampler, state.policy, config.rollout.backend):
            _train(run, state, stream, ahead, counters, status, stop)
        # However long process 0 writes, the others wait for it here.
        status.signal = spread.agreed(stop.requested)
    return 0 if status.signal is None else 128 + signal.Signals[status.signal]


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Bad input ends the process with its sentence. Past the preparation nothing is caught."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def _cache_compilations() -> None:
    """A second run starts without compiling. The usual JAX variables override all three."""
    cache = pathlib.Path.home() / ".cache" / "eqrl" / "xla"
    for name, value in (
        ("jax_compilation_cache_dir", str(cache)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _source(config: Config) -> str:
    return str(DEMO) if config.model == "demo" else config.model


def _load(
    config: Config, algorithm: eqrl.Algorithm, optimizer: optax.GradientTransformation
) -> tuple[models.Loaded, Meshes]:
    """The model, every array straight into its place, and the meshes."""
    dtype = jnp.dtype(config.dtype)
    if config.mesh is None:
        if jax.device_count() > 1:
            print(f"1 of {jax.device_count()} devices is used; --mesh auto uses all")
        return models.load(_source(config), dtype=dtype), Meshes()
    found = []

    def place(model: models.Transformer):
        state = state_shapes(model, algorithm, optimizer)
        # Memory as process 0 sees it: all must choose alike.
        capacity = spread.from_first(lambda: sharding.plan.here().chip.hbm_bytes)
        meshes = choose_meshes(config, model, state, jax.devices(), capacity)
        batch_on(config, meshes.train)  # contradictions are refused before a weight is read
        found.append(meshes)
        _say(config, meshes)
        assert meshes.train is not None
        return sharding.shardings(model, meshes.train, model.architecture)

    return models.load(_source(config), dtype=dtype, place=place), found[0]


def _say(config: Config, meshes: Meshes) -> None:
    """Why this mesh, and what it makes of a pass."""
    if meshes.why:
        print(meshes.why)
    batch, cut = batch_on(config, meshes.sample), spread.shards(meshes.sample)
    size = spread.padded(batch.prompts_per_pass, meshes.sample)
    if size != batch.prompts_per_pass:
        print(
            f"{batch.prompts_per_pass} prompts a pass are padded to {size}, for the completions of "
            f"a prompt stay on one of {cut} row shards: {size * batch.samples_per_prompt // cut} "
            "sequences a device"
        )


def _prepare(
    config: Config, task: Task, folder: pathlib.Path, resume: Resume | None
) -> tuple[Run, models.Transformer]:
    """What stays, and the policy to start from."""
    # What contradicts itself or cannot run here is refused before anything is loaded.
    check_backend(config, task)
    batch_on(config, stated_mesh(config))
    implementation_for(config, None, jax.default_backend())
    data.assert_disjoint(
        (record.get("key", record["question"]) for record in task.train),
        (record.get("key", record["question"]) for record in task.held_out),
    )
    weights = _weights(config, task)
    # An algorithm that folds the components itself (gdpo) takes the same weights.
    reward = dataclasses.replace(config.reward, weights=weights)
    config = dataclasses.replace(config, reward=reward)
    algorithm = build_algorithm(config)
    optimizer = build_optimizer(config, derived(config)["updates"])
    loaded, meshes = _load(config, algorithm, optimizer)
    if not loaded.stop_ids:
        raise ValueError(f"--model {config.model} names no stop token; add one to its config.json")
    tokenizer = models.load_tokenizer(loaded)
    system = task.system if config.data.system_prompt is None else config.data.system_prompt
    train, held_out = (
        evaluation.encode(records, tokenizer, system or None, config.data.max_prompt_tokens)
        for records in (task.train[: config.data.limit or None], task.held_out)
    )
    spread.assert_same_data(train.tokens, held_out.tokens)
    assert config.rollout.samples is not None and config.rollout.max_tokens is not None
    run = Run(
        config=config,
        task=task,
        folder=folder,
        algorithm=algorithm,
        optimizer=optimizer,
        reference=loaded.model if "ref_logprobs" in algorithm.requires else None,
        stop_ids=loaded.stop_ids,
        tokenizer=tokenizer,
        prompts=train,
        held_out=held_out,
        sampler=sampler_for(config, task, tokenizer, max(map(len, train.tokens + held_out.tokens))),
        sampling=samplers.Sampling(
            config.rollout.samples,
            config.rollout.max_tokens,
            loaded.stop_ids,
            config.rollout.temperature,
        ),
        weights=weights,
        implementation=implementation_for(config, meshes.train, jax.default_backend()),
        meshes=meshes,
        timer=tracking.StepTimer(),
        console=tracking.Console(
            config.steps or 0,
            first_step=0 if resume is None else resume.step,
            bar=None if sharding.is_first() else False,
        ),
    )
    return run, loaded.model


def _weights(config: Config, task: Task) -> tuple[float, ...]:
    weights, names = (
        tuple(config.reward.weights or task.weights),
        rewards.reward_names(task.rewards),
    )
    if len(weights) != len(names):
        raise ValueError(
            f"--reward.weights has {len(weights)} numbers but {task.name} has {len(names)} rewards "
            f"({', '.join(names)}); give one each"
        )
    if not any(weights):
        raise ValueError(
            "--reward.weights are all 0, so nothing could be learned; give one a value"
        )
    return weights


def _begin(run: Run, policy: models.Transformer, resume: Resume | None):
    """The state of the first step: fresh, or as a checkpoint left it."""

    def make() -> eqrl.TrainState:
        critic = None
        if "values" in run.algorithm.requires:
            critic = models.ValueModel.init(policy)
        return eqrl.init(policy, run.algorithm, run.optimizer, critic=critic)

    mesh, facts = run.meshes.train, policy.architecture
    stream = data.PromptStream(len(run.prompts.records), run.config.seed)
    counters = {"prompts_seen": 0, "tokens_seen": 0}
    if resume is None:
        state = make() if mesh is None else sharding.create(make, mesh, facts)
        return state, stream, counters, []
    # Restored into shapes: a second state would not fit beside it.
    one = sharding.make_mesh("data=1", jax.devices()[:1])
    target = sharding.abstract(eqx.filter_eval_shape(make), mesh or one, facts)
    arrays, static = eqx.partition(target, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    with Checkpoints(resume.folder) as checkpoints:
        arrays, extra = checkpoints.restore(arrays, resume.step)
    for name, value in _identity(run).items():
        if extra["run"][name] != value:
            raise ValueError(
                f"--resume: the checkpoint's {name} is {extra['run'][name]}, this run's {value}; "
                "repeat the first run's arguments or choose another --run-dir"
            )
    stream.restore(extra["stream"])
    print(f"resumed {resume.folder} at step {resume.step}")
    rows = extra.get("ahead", [])
    return eqx.combine(arrays, static), stream, dict(extra["counters"]), rows


def _identity(run: Run) -> dict[str, Any]:
    """What may not change between a run and its continuation."""
    return {
        "seed": run.config.seed,
        "algorithm": repr(run.algorithm),
        "problems": len(run.prompts.records),
    }


def _train(
    run: Run,
    state: eqrl.TrainState,
    stream: data.PromptStream,
    ahead: Ahead,
    counters: dict[str, int],
    status: tracking.ExitStatus,
    stop: tracking.StopRequest,
) -> None:
    config, steps = run.config, run.config.steps or 0
    done = saved = status.step or 0
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=config.checkpoint.keep or 10**9)
    checkpoints.drop_after(done)
    tracker = _trackers(run, done) if sharding.is_first() else tracking.combine()
    ended = "exception"

    def where() -> dict[str, Any]:
        return {"stream": [*stream.state()], "ahead": ahead.rows()}

    place = where()

    def save() -> None:
        start = time.perf_counter()
        arrays, _ = eqx.partition(state, eqx.is_array)
        extra = place | {"counters": counters, "run": _identity(run)}
        if not checkpoints.save(done, arrays, extra):
            run.console.notice(f"save-{done}", f"step {done} is not on disk as a checkpoint")
        tracker.log(done, {"time/ckpt": time.perf_counter() - start})

    try:
        evaluate = evaluation.Evaluator(
            run.held_out,
            run.task,
            run.stop_ids,
            run.tokenizer,
            config,
            run.weights,
            run.meshes,
            run.sampler,
        )
        if done == 0 and not spread.agreed(stop.requested):
            tracker.log(0, evaluate.full(state))
        while done < steps and not spread.agreed(stop.requested):
            with run.timer.step():
                rollout, metrics = collect(run, state, stream, ahead, done)
                state, learned = learn(run, state, rollout, done)
            done += 1
            status.step, place = done, where()
            metrics |= learned | _count(run, metrics.pop("sampled"), rollout, counters, stream)
            tracker.log(done, metrics)
            _notices(run, done, metrics)
            every = config.checkpoint.every
            if every and done % every == 0:
                save()
                saved = done
            every = config.eval.every
            if every and done % every == 0 and done < steps:
                if not spread.agreed(stop.requested):
                    tracker.log(done, evaluate.light(state))
        if done > saved:
            save()
        if not spread.agreed(stop.requested) and (steps > 0 or done > 0):
            tracker.log(done, evaluate.full(state))
    except samplers.EngineError as error:
        # The steps that are done are worth keeping; --resume goes on from here.
        if done > saved:
            save()
        raise SystemExit(f"error: {error}") from None
    else:
        ended = "success" if spread.agreed(stop.requested) is None else "signal"
    finally:
        try:
            checkpoints.close()
        finally:
            tracker.finish(ended)
    _leave(run, state.policy, evaluate)


def _trackers(run: Run, first: int) -> tracking.Combined:
    config = run.config
    facts = {"row_shards": spread.shards(run.meshes.train), "processes": jax.process_count()}
    resolved = describe(config, len(run.prompts.records), **facts)
    run.folder.mkdir(parents=True, exist_ok=True)
    tracking.write_atomic(run.folder / "config.yaml", resolved.encode())
    ran_by = {
        "platform": jax.default_backend(),
        "log_probs": getattr(run.implementation, "__name__", repr(run.implementation)),
    }
    tracking.write_json(run.folder / "version.json", tracking.code_version() | ran_by)
    jsonl = tracking.Jsonl(run.folder / "metrics.jsonl")
    jsonl.truncate_after(first or -1)
    project, _, name = config.track.project.partition("/")
    wandb = tracking.Wandb(
        mode=config.track.wandb,
        project=project,
        name=name or run.folder.name,
        config=dataclasses.asdict(config) | {"algorithm": repr(run.algorithm)},
        folder=run.folder,
    )
    return tracking.combine(jsonl, wandb, run.console)


def _count(
    run: Run,
    sampled: float,
    rollout: eqrl.Rollout,
    counters: dict[str, int],
    stream: data.PromptStream,
) -> dict[str, float]:
    """Time, throughput, memory and how far through the data; `counters` moves on."""
    timer, trained = run.timer, float(np.asarray(rollout.mask).sum())
    state = stream.state()
    size = len(run.prompts.records)
    counters["prompts_seen"] = state.epoch * size + state.cursor
    counters["tokens_seen"] += int(sampled)
    per_second = tracking.throughput(trained, timer.seconds("update") + timer.seconds("logp"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = jax.local_devices()[0].memory_stats() or {}
    short = {"gen": "rollout", "reward": "reward", "logp": "logp", "update": "update"}
    return timer.metrics() | {
        **{f"time/{name}": timer.seconds(phase) for name, phase in short.items()},
        "time/step": timer.seconds("step"),
        "perf/tok_per_s_gen": tracking.throughput(sampled, timer.seconds("rollout")),
        "perf/tok_per_s_train": per_second,
        "throughput/train/valid_tokens_per_s_update": per_second,
        "throughput/train/valid_tokens_per_s": tracking.throughput(trained, timer.seconds("step")),
        "perf/mem_peak_gb": device.get("peak_bytes_in_use", peak) / 1e9,
        "data/prompts_seen": float(counters["prompts_seen"]),
        "data/tokens_seen": float(counters["tokens_seen"]),
        "data/epoch": counters["prompts_seen"] / size,
    }


def _notices(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Facts that look like bugs when nobody says them; each once."""
    notice = run.console.notice
    if metrics.get("policy/ratio_min") == metrics.get("policy/ratio_max") == 1.0:
        notice(
            "ratio", "one update per rollout, so the ratio is identically 1 (as intended on-policy)"
        )
    if metrics.get("group/zero_std_frac") == 1.0:
        notice(
            "constant",
            f"step {step}: every group is constant (all completions of a prompt earned the same), "
            "so group-relative advantages are zero",
        )
    if metrics.get("optim/skipped_nonfinite", 0) > 0:
        notice("nonfinite", f"step {step}: gradients were not finite; such updates are skipped")


def _leave(run: Run, policy: models.Transformer, evaluate: evaluation.Evaluator) -> None:
    """The model, the curve and the samples, and where they are."""
    policy = spread.to_first(policy, run.meshes.train)
    if sharding.is_first():
        _write(run, policy, evaluate)


def _write(run: Run, policy: models.Transformer, evaluate: evaluation.Evaluator) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    models.save(policy, run.folder / "model", tokenizer=run.tokenizer, stop_ids=run.stop_ids)
    title = f"{run.task.name}, {run.config.algo.name}, seed {run.config.seed}"
    tracking.draw_curve(
        run.folder / "metrics.jsonl",
        run.folder / "curve.png",
        title=title,
        evaluations=("eval/acc_strict", "eval/acc_lenient"),
    )
    if evaluate.samples:
        tracking.write_samples(run.folder / "samples.md", evaluate.samples, title=title)
        tracking.print_samples(evaluate.samples)
    _print_accuracy(run.folder)
    print(f"curve, samples, metrics and model are in {run.folder}/")


def _print_accuracy(folder: pathlib.Path) -> None:
    """Held-out accuracy of the first and the last full sweep, also of a resumed run."""
    name = "eval_full/problems"
    sweeps = [r for r in tracking.read_jsonl(folder / "metrics.jsonl") if name in r]
    if len(sweeps) < 2:
        return
    print(f"held-out accuracy on {int(sweeps[0][name])} problems   before   after")
    for kind in ("strict", "lenient"):
        before, after = (sweep[f"eval_full/acc_{kind}"] for sweep in (sweeps[0], sweeps[-1]))
        print(f"  {kind:<34} {before:7.1%} {after:7.1%}")
