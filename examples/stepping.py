"""One training step: sample and reward, then advantages and updates."""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import evaluation
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from asking import Ahead, Asked, Batch, ask
from config import Config, batch_plan, derived, required, schedule
from jax.sharding import Mesh
from layout import Meshes, to_sample
from spread import join, own_share, padded, shards, spread, whole
from task import Task

import eqrl
from eqrl import data, models, rewards, samplers, sharding, tracking


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: Config
    task: Task
    folder: pathlib.Path
    algorithm: eqrl.Algorithm
    optimizer: optax.GradientTransformation
    reference: models.Transformer | None
    stop_ids: tuple[int, ...]
    tokenizer: Any
    prompts: evaluation.Encoded
    held_out: evaluation.Encoded
    sampler: samplers.Sampler
    sampling: samplers.Sampling
    weights: tuple[float, ...]
    implementation: eqrl.logprobs.LogProbs
    meshes: Meshes
    timer: tracking.StepTimer
    console: tracking.Console


def batch_on(config: Config, mesh: Mesh | None) -> sharding.BatchPlan:
    """The numbers of a step's batch on the mesh and all processes."""
    return batch_plan(config, row_shards=shards(mesh), processes=jax.process_count())


def collect(
    run: Run, state: eqrl.TrainState, stream: data.PromptStream, ahead: Ahead, step: int
) -> tuple[eqrl.Rollout, dict[str, Any]]:
    """A rollout with rewards; with a selection, sampled anew until enough groups are alive.

    Reward and length metrics describe everything that was sampled, not only what survives.
    """
    sampled: list[tuple[eqrl.Rollout, rewards.Scored]] = []
    baselines: list[tuple[eqrl.Rollout, rewards.Scored]] = []
    prompts, now = run.config.rollout.prompts or 1, int(state.updates)
    ages: list[np.ndarray] = []
    policy = to_sample(state.policy, run.meshes, run.sampler)

    def begin(step: int, rows: list[int] | None = None, round: int = 0) -> Batch:
        rows = list(stream.take(prompts)) if rows is None else rows
        tokens = [run.prompts.tokens[i] for i in rows]
        batch = eqrl.pad_prompts(tokens, _distinct(run, rows), width=_width(run))
        key = jr.fold_in(jr.fold_in(jr.key(run.config.seed), step), round)
        return Batch(rows, batch, _ask(run, policy, batch, run.sampling, key=key, version=now))

    def sample(round: int) -> eqrl.Rollout:
        with run.timer("rollout"):
            batch = ahead.take(step, begin) if round == 0 else begin(step, round=round)
            rollout = batch.asked.result()
            jax.block_until_ready(rollout)
        rollout = _fresh(run, rollout, now, ages)
        with run.timer("reward"):
            rollout, scored = _reward(run, rollout, batch.rows)
        sampled.append((rollout, scored))
        if "greedy_rewards" in run.algorithm.requires:
            rollout, judged = _with_greedy(run, policy, rollout, batch, now)
            baselines.append(judged)
        return rollout

    if run.algorithm.selection is None or not run.config.algo.max_refills:
        rollout, metrics = sample(0), {}
    else:
        rollout, metrics = eqrl.refill(
            sample, run.algorithm.selection, prompts, rounds=run.config.algo.max_refills
        )
    return rollout, metrics | _aged(run, ages) | _described(run, sampled, baselines)


def _ask(
    run: Run, policy: models.Transformer, prompts: eqrl.Prompts, sampling, *, key, version
) -> Asked:
    return ask(
        run.sampler,
        policy,
        prompts,
        sampling,
        key=key,
        size=batch_plan(run.config).prompts_per_pass,
        meshes=run.meshes,
        version=version,
    )


def _fresh(run: Run, rollout: eqrl.Rollout, now: int, ages: list[np.ndarray]) -> eqrl.Rollout:
    """Without what is older than `--rollout.overlap` allows; notes the ages, in updates."""
    age = now - np.asarray(rollout.need("version"))
    ages.append(age[np.asarray(rollout.mask).any(axis=1)])
    return eqrl.apply(rollout, jnp.asarray(age <= _oldest(run)))


def _oldest(run: Run) -> int:
    """The age in updates that a completion may have."""
    return run.config.rollout.overlap * batch_plan(run.config).updates_per_step


def _aged(run: Run, ages: list[np.ndarray]) -> dict[str, float]:
    """How old was what the step has sampled."""
    age = np.concatenate(ages)
    if not run.config.rollout.overlap or not age.size:
        return {}
    return {
        "rollout/age_mean": float(age.mean()),
        "rollout/age_max": float(age.max()),
        "rollout/stale_frac": float((age > _oldest(run)).mean()),
    }


def _with_greedy(
    run: Run,
    policy: models.Transformer,
    rollout: eqrl.Rollout,
    batch: Batch,
    now: int,
) -> tuple[eqrl.Rollout, tuple[eqrl.Rollout, rewards.Scored]]:
    """The rollout with the reward of one greedy completion per prompt, on all rows of the prompt.

    Where that reward failed there is no baseline, and the prompt trains nothing.
    """
    with run.timer("rollout"):
        best = dataclasses.replace(run.sampling, samples=1, temperature=0.0)
        greedy = _ask(run, policy, batch.prompts, best, key=jr.key(0), version=now).result()
        jax.block_until_ready(greedy)
    with run.timer("reward"):
        greedy, scored = _reward(run, greedy, batch.rows)
    total = rewards.weighted(np.asarray(greedy.rewards), [w for w in run.weights if w != 0])
    samples = rollout.group.shape[0] // len(batch.rows)
    known = np.repeat(np.asarray(greedy.mask).any(axis=1), samples)
    baseline = jnp.asarray(np.repeat(total, samples))
    rollout = eqrl.apply(rollout, jnp.asarray(known))
    return dataclasses.replace(rollout, greedy_rewards=baseline), (greedy, scored)


def _described(
    run: Run,
    sampled: list[tuple[eqrl.Rollout, rewards.Scored]],
    baselines: list[tuple[eqrl.Rollout, rewards.Scored]],
) -> dict[str, Any]:
    """Metrics of all rounds of a step; groups of different rounds are different groups.

    Greedy completions count as sampled tokens and where their reward failed, nowhere else.
    """
    parts, rows = [], 0
    for rollout, scored in sampled:
        components = jnp.asarray(scored.components)
        parts.append(dataclasses.replace(rollout, rewards=components, group=rollout.group + rows))
        rows += rollout.group.shape[0]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    total = rewards.weighted(np.asarray(joined.rewards), run.weights)
    found = eqrl.rollout_metrics(joined, total, rewards.reward_names(run.task.rewards))
    return found | {
        "reward_fn/errors": float(sum(scored.errors for _, scored in sampled + baselines)),
        "reward_fn/timeouts": float(sum(scored.timeouts for _, scored in sampled + baselines)),
        "sampled": float(sum(np.asarray(r.mask).sum() for r, _ in [*sampled, *baselines])),
    }


def _distinct(run: Run, rows: Sequence[int]) -> list[int]:
    """Sampling ids: a problem that comes twice in a batch is sampled anew the second time."""
    size, seen, ids = len(run.prompts.records), Counter(), []
    for row in rows:
        ids.append(row + size * seen[row])
        seen[row] += 1
    return ids


def _width(run: Run) -> int:
    return max(map(len, run.prompts.tokens))


def _reward(
    run: Run, rollout: eqrl.Rollout, rows: Sequence[int]
) -> tuple[eqrl.Rollout, rewards.Scored]:
    """The raw reward components; a completion whose reward function failed trains nothing.

    Each process rewards its own share. The rollout carries the components that have a weight: a
    component that is only watched must not decide which groups teach something.
    """
    count = rollout.group.shape[0]
    own, samples = own_share(count), count // len(rows)
    arrays = rollout.tokens, rollout.mask, rollout.positions
    tokens, mask, positions = (np.asarray(x)[own] for x in arrays)
    texts = data.decode_completions(tokens, mask, run.tokenizer, positions=positions)
    records = [run.prompts.records[i] for i in rows for _ in range(samples)][own]
    scored = rewards.score(run.task.rewards, texts, records, timeout=run.config.reward.timeout)
    scored = join(scored, count)
    rollout = eqrl.apply(rollout, jnp.asarray(~scored.failed))
    weighted = jnp.asarray(scored.components[:, np.asarray(run.weights) != 0])
    return dataclasses.replace(rollout, rewards=weighted), scored


def learn(
    run: Run, state: eqrl.TrainState, rollout: eqrl.Rollout, step: int
) -> tuple[eqrl.TrainState, dict[str, float]]:
    """Rewards to advantages, advantages to updates."""
    config, algorithm = run.config, run.algorithm
    total = rewards.weighted(np.asarray(rollout.rewards), [w for w in run.weights if w != 0])
    metrics = {}
    count, epochs = config.algo.minibatches or 1, config.algo.epochs or 1
    if config.algo.old_logprobs == "sampler":
        rollout = dataclasses.replace(rollout, old_logprobs=rollout.logprobs)
    options = {
        "temperature": config.rollout.temperature,
        "implementation": run.implementation,
        "micro_batch": batch_on(config, run.meshes.train).micro_batch_sequences,
    }
    rows, mesh = rollout.tokens.shape[0], run.meshes.train
    with run.timer("logp"):
        annotated = eqrl.annotate(
            spread(eqrl.pad_rows(eqrl.compact(rollout), padded(rows, mesh)), mesh),
            required(config, algorithm),
            policy=state.policy,
            reference=run.reference,
            critic=state.critic,
            **options,
        )
        jax.block_until_ready(annotated)
        # What pads the mesh is gone before anything is counted or cut into minibatches.
        rollout = jax.tree.map(lambda x: x[:rows], whole(annotated, mesh))
    with run.timer("advantages"):
        signal = eqrl.outcome(jnp.asarray(total), rollout.mask)
        batch, estimators = _assign(algorithm, signal, state.algorithm, rollout)
        state = dataclasses.replace(state, algorithm=estimators)
        metrics |= eqrl.advantage_metrics(batch.advantages, batch.rollout.mask)
        if batch.targets is not None:
            metrics |= eqrl.value_metrics(rollout.values, batch.targets, rollout.mask)
    with run.timer("update"):
        rate = schedule(config, config.optim.lr or 0.0, derived(config)["updates"])
        metrics["optim/lr"] = float(rate(state.updates))
        updated = []
        for epoch in range(epochs):
            key = jr.fold_in(jr.fold_in(jr.key(config.seed + 1), step), epoch)
            for part in eqrl.minibatches(batch, algorithm, count, key=key):
                tokens = int(np.asarray(part.rollout.mask).sum())
                part = eqrl.pad_batch(part, padded(part.weights.shape[0], mesh))
                part = spread(part, mesh)
                state, numbers = eqrl.update(
                    state,
                    part,
                    algorithm,
                    run.optimizer,
                    remat=config.optim.remat,
                    **options,
                )
                updated.append((tokens, numbers))
        metrics |= _averaged(updated)
    return state, metrics


@eqx.filter_jit
def _assign(algorithm, signal, state, rollout):
    return algorithm.assign(signal, state, rollout)


def _averaged(updates: list[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    """Metrics over a step's updates: means over their tokens, except for extremes and counts."""
    merge = {"_max": max, "_min": min, "nonfinite": max}
    tokens = [max(count, 1) for count, _ in updates]
    found = {}
    for name in updates[0][1]:
        values = [float(numbers[name]) for _, numbers in updates]
        extreme = next((f for end, f in merge.items() if name.endswith(end)), None)
        mean = float(np.average(values, weights=tokens))
        found[name] = mean if extreme is None else float(extreme(values))
    # How far sampler and trainer disagree is a fact of the rollout, not of later updates.
    first = updates[0][1]
    return found | {n: float(x) for n, x in first.items() if n.startswith("mismatch/")}
