"""The loop that every example runs: sample, reward, assign, update; evaluate, save, draw.

`train(config, task)` reads top to bottom. The parts that carry an algorithm are eqrl's; what is
here is order, files and numbers.
"""

import dataclasses
import logging
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import evaluation
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from config import Config, build_algorithm, build_optimizer, derived, describe, schedule
from task import Task

import eqrl
from eqrl import data, models, rewards, samplers, tracking
from eqrl.checkpoint import Checkpoints, Resume, resolve_resume


DEMO = pathlib.Path(__file__).parent / "demo_model"


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: Config
    task: Task
    folder: pathlib.Path
    algorithm: eqrl.Algorithm
    optimizer: optax.GradientTransformation
    loaded: models.Loaded
    tokenizer: Any
    prompts: evaluation.Encoded
    held_out: evaluation.Encoded
    sampler: samplers.Sampler
    weights: tuple[float, ...]
    implementation: eqrl.Implementation
    timer: tracking.StepTimer
    console: tracking.Console


def train(config: Config, task: Task) -> int:
    """Trains, and leaves a run folder that tells the story. Returns the process's exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # transformers warns that PyTorch is missing; nothing here uses it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _cache_compilations()
    folder = pathlib.Path(str(config.run_dir))
    try:
        resume = resolve_resume(config.resume, folder)
        with tracking.exit_status(folder) as status, tracking.StopRequest() as stop:
            run = _prepare(config, task, folder, resume)
            _train(run, resume, status, stop)
        return 0 if stop.requested is None else 128 + signal.Signals[stop.requested]
    except ValueError as error:
        # Bad input, found by whichever part read it: one sentence. Bugs raise other types.
        if os.environ.get("EQRL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def _prepare(config: Config, task: Task, folder: pathlib.Path, resume: Resume | None) -> Run:
    data.assert_disjoint(
        (record.get("key", record["question"]) for record in task.train),
        (record.get("key", record["question"]) for record in task.held_out),
    )
    loaded = models.load(
        str(DEMO) if config.model == "demo" else config.model, dtype=jnp.dtype(config.dtype)
    )
    if not loaded.stop_ids:
        raise ValueError(f"--model {config.model} names no stop token; add one to its config.json")
    tokenizer = models.load_tokenizer(loaded)
    system = task.system if config.data.system_prompt is None else config.data.system_prompt
    train, held_out = (
        evaluation.encode(records, tokenizer, system or None, config.data.max_prompt_tokens)
        for records in (task.train[: config.data.limit or None], task.held_out)
    )
    weights = config.reward.weights or task.weights
    if len(weights) != len(task.rewards):
        raise ValueError(
            f"--reward.weights has {len(weights)} numbers but {task.name} has {len(task.rewards)} "
            f"rewards ({', '.join(rewards.reward_names(task.rewards))}); give one each"
        )
    assert config.rollout.samples is not None and config.rollout.max_tokens is not None
    return Run(
        config=config,
        task=task,
        folder=folder,
        algorithm=build_algorithm(config),
        optimizer=build_optimizer(config, derived(config)["updates"]),
        loaded=loaded,
        tokenizer=tokenizer,
        prompts=train,
        held_out=held_out,
        sampler=samplers.Decoder(
            config.rollout.samples,
            config.rollout.max_tokens,
            loaded.stop_ids,
            config.rollout.temperature,
        ),
        weights=tuple(weights),
        implementation={"auto": None, "jax": "chunked"}.get(
            config.policy_loss_impl, config.policy_loss_impl
        ),
        timer=tracking.StepTimer(),
        console=tracking.Console(
            config.steps or 0, first_step=0 if resume is None else resume.step
        ),
    )


def _train(
    run: Run,
    resume: Resume | None,
    status: tracking.ExitStatus,
    stop: tracking.StopRequest,
) -> None:
    config, steps = run.config, run.config.steps or 0
    critic = None
    if "values" in run.algorithm.requires:
        critic = models.ValueModel.init(run.loaded.model)
    state = eqrl.init(run.loaded.model, run.algorithm, run.optimizer, critic=critic)
    stream = data.PromptStream(len(run.prompts.records), config.seed)
    counters = {"prompts_seen": 0, "tokens_seen": 0}
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=config.checkpoint.keep or 10**9)
    first = 0
    if resume is not None:
        state, counters, first = _restore(resume, state, stream)
        checkpoints.drop_after(first)
    tracker = _trackers(run, first)
    evaluate = evaluation.Evaluator(run.held_out, run.task, run.loaded, run.tokenizer, config)
    ended = "exception"
    try:
        if first == 0:
            tracker.log(0, evaluate.full(state.policy))
        for step in range(first, steps):
            with run.timer.step():
                rollout, metrics = _collect(run, state, stream, step)
                state, learned = _learn(run, state, rollout, step)
            metrics |= learned | _count(run, rollout, counters, stream)
            step += 1
            status.step = step
            tracker.log(step, metrics)
            _notices(run, step, metrics)
            last = step == steps or stop.requested is not None
            if not last and config.eval.every and step % config.eval.every == 0:
                tracker.log(step, evaluate.light(state.policy))
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                arrays, _ = eqx.partition(state, eqx.is_array)
                extra = {"stream": [*stream.state()], "counters": counters}
                start = time.perf_counter()
                if not checkpoints.save(step, arrays, extra) and last:
                    print("the last checkpoint could not be saved; the model folder still is")
                tracker.log(step, {"time/ckpt_s": time.perf_counter() - start})
            if stop.requested is not None:
                status.signal = stop.requested
                break
        if stop.requested is None and steps > 0:
            tracker.log(steps, evaluate.full(state.policy))
        ended = "success" if stop.requested is None else "signal"
    finally:
        checkpoints.close()
        tracker.finish(ended)
    _leave(run, state.policy, evaluate)


def _restore(resume: Resume, state: eqrl.TrainState, stream: data.PromptStream):
    arrays, static = eqx.partition(state, eqx.is_array)
    with Checkpoints(resume.folder) as checkpoints:
        arrays, extra = checkpoints.restore(arrays, resume.step)
    stream.restore(extra["stream"])
    print(f"resumed {resume.folder} at step {resume.step}")
    return eqx.combine(arrays, static), dict(extra["counters"]), resume.step


def _trackers(run: Run, first: int) -> tracking.Combined:
    config = run.config
    resolved = describe(config, len(run.prompts.records))
    run.folder.mkdir(parents=True, exist_ok=True)
    tracking.write_atomic(run.folder / "config.yaml", resolved.encode())
    tracking.write_json(run.folder / "version.json", tracking.code_version())
    jsonl = tracking.Jsonl(run.folder / "metrics.jsonl")
    jsonl.truncate_after(first or -1)
    wandb = tracking.Wandb(
        mode=config.track.wandb,
        project=config.track.project,
        name=config.track.name or run.folder.name,
        config=dataclasses.asdict(config) | {"algorithm": repr(run.algorithm)},
        folder=run.folder,
    )
    return tracking.combine(jsonl, wandb, run.console)


def _collect(
    run: Run, state: eqrl.TrainState, stream: data.PromptStream, step: int
) -> tuple[eqrl.Rollout, dict[str, float]]:
    """A rollout with rewards; with a selection, sampled anew until enough groups are alive."""
    faults = {"reward_fn/errors": 0.0, "reward_fn/timeouts": 0.0, "sampled_tokens": 0.0}
    prompts = run.config.rollout.prompts or 1
    key = jr.fold_in(jr.key(run.config.seed), step)

    def sample(round: int) -> eqrl.Rollout:
        rows = stream.take(prompts)
        with run.timer("rollout"):
            batch = eqrl.pad_prompts([run.prompts.tokens[i] for i in rows], rows, width=_width(run))
            rollout = run.sampler(state.policy, batch, key=jr.fold_in(key, round))
            jax.block_until_ready(rollout)
        with run.timer("reward"):
            return _reward(run, rollout, rows, faults)

    if run.algorithm.selection is None or not run.config.algo.max_refills:
        return sample(0), faults
    rollout, metrics = eqrl.refill(
        sample, run.algorithm.selection, prompts, rounds=run.config.algo.max_refills
    )
    return rollout, metrics | faults


def _width(run: Run) -> int:
    return max(map(len, run.prompts.tokens))


def _reward(
    run: Run, rollout: eqrl.Rollout, rows: Sequence[int], faults: dict[str, float]
) -> eqrl.Rollout:
    """The raw reward components; a completion whose reward function failed trains nothing."""
    mask = np.asarray(rollout.mask)
    texts = data.decode_completions(np.asarray(rollout.tokens), mask, run.tokenizer)
    samples = len(texts) // len(rows)
    records = [run.prompts.records[i] for i in rows for _ in range(samples)]
    scored = rewards.score(run.task.rewards, texts, records, timeout=run.config.reward.timeout)
    faults["reward_fn/errors"] += scored.errors
    faults["reward_fn/timeouts"] += scored.timeouts
    faults["sampled_tokens"] += float(mask.sum())
    rollout = eqrl.apply(rollout, jnp.asarray(~scored.failed))
    return dataclasses.replace(rollout, rewards=jnp.asarray(scored.components))


def _learn(
    run: Run, state: eqrl.TrainState, rollout: eqrl.Rollout, step: int
) -> tuple[eqrl.TrainState, dict[str, float]]:
    """Rewards to advantages, advantages to updates."""
    config, algorithm = run.config, run.algorithm
    total = rewards.weighted(np.asarray(rollout.rewards), run.weights)
    metrics = eqrl.rollout_metrics(rollout, total, rewards.reward_names(run.task.rewards))
    count, epochs = config.algo.minibatches or 1, config.algo.epochs or 1
    requires = algorithm.requires | ({"old_logprobs"} if count * epochs > 1 else set())
    options = {
        "temperature": config.rollout.temperature,
        "implementation": run.implementation,
        "micro_batch": config.optim.micro_batch or None,
    }
    with run.timer("logp"):
        rollout = eqrl.annotate(
            eqrl.compact(rollout),
            frozenset(requires),
            policy=state.policy,
            reference=run.loaded.model,
            critic=state.critic,
            **options,
        )
        jax.block_until_ready(rollout)
    with run.timer("advantages"):
        signal = eqrl.outcome(jnp.asarray(total), rollout.mask)
        batch, estimators = _assign(algorithm, signal, state.algorithm, rollout)
        state = dataclasses.replace(state, algorithm=estimators)
        metrics |= eqrl.advantage_metrics(batch.advantages, batch.rollout.mask)
    with run.timer("update"):
        updated = []
        for epoch in range(epochs):
            key = jr.fold_in(jr.fold_in(jr.key(config.seed + 1), step), epoch)
            for part in eqrl.minibatches(batch, algorithm, count, key=key):
                rate = schedule(config, config.optim.lr or 0.0, derived(config)["updates"])
                metrics["optim/lr"] = float(rate(state.updates))
                state, numbers = eqrl.update(state, part, algorithm, run.optimizer, **options)
                updated.append(numbers)
        metrics |= _averaged(updated)
    return state, metrics


@eqx.filter_jit
def _assign(algorithm, signal, state, rollout):
    return algorithm.assign(signal, state, rollout)


def _averaged(updates: list[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics over a step's updates: means, except for extremes and counts."""
    merge = {"_max": max, "_min": min, "nonfinite": max}
    found = {}
    for name in updates[0]:
        values = [float(numbers[name]) for numbers in updates]
        function = next((f for end, f in merge.items() if name.endswith(end)), np.mean)
        found[name] = float(function(values))
    # How far sampler and trainer disagree is a fact of the rollout, not of later updates.
    found |= {name: float(x) for name, x in updates[0].items() if name.startswith("mismatch/")}
    return found


def _count(
    run: Run, rollout: eqrl.Rollout, counters: dict[str, int], stream: data.PromptStream
) -> dict[str, float]:
    """Time, throughput, memory and how far through the data; `counters` moves on."""
    timer, tokens = run.timer, float(np.asarray(rollout.mask).sum())
    state = stream.state()
    size = len(run.prompts.records)
    counters["prompts_seen"] = state.epoch * size + state.cursor
    counters["tokens_seen"] += int(tokens)
    train = timer.seconds("update") + timer.seconds("logp")
    per_second = tracking.throughput(tokens, train)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    device = jax.local_devices()[0].memory_stats() or {}
    return timer.metrics() | {
        "perf/tok_per_s_gen": tracking.throughput(tokens, timer.seconds("rollout")),
        "perf/tok_per_s_train": per_second,
        "throughput/train/valid_tokens_per_s_update": per_second,
        "throughput/train/valid_tokens_per_s": tracking.throughput(tokens, timer.seconds("step")),
        "perf/mem_peak_gb": device.get("peak_bytes_in_use", peak * 1e9) / 1e9,
        "data/prompts_seen": float(counters["prompts_seen"]),
        "data/tokens_seen": float(counters["tokens_seen"]),
        "data/epoch": counters["prompts_seen"] / size,
    }


def _notices(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Facts that look like bugs when nobody says them; each once."""
    notice = run.console.notice
    if step == 1 and metrics.get("policy/ratio_min") == metrics.get("policy/ratio_max") == 1.0:
        notice(
            "ratio",
            "one update per rollout, so the ratio is identically 1 and clipping never acts "
            "(as intended on-policy; --algo.epochs or --algo.minibatches change it)",
        )
    if metrics.get("group/zero_std_frac") == 1.0:
        notice(
            "constant",
            f"step {step}: every group is constant (all completions of a prompt earned the same), "
            "so group-relative advantages are zero",
        )
    if metrics.get("optim/skipped_nonfinite", 0) > 0:
        notice("nonfinite", f"step {step}: a gradient was not finite; that update was skipped")


def _leave(run: Run, policy: models.Transformer, evaluate: evaluation.Evaluator) -> None:
    """The model, the curve and the samples, and where they are."""
    run.folder.mkdir(parents=True, exist_ok=True)
    models.save(policy, run.folder / "model", tokenizer=run.tokenizer, stop_ids=run.loaded.stop_ids)
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
    evaluate.print_summary()
    print(f"curve, samples, metrics and model are in {run.folder}/")
