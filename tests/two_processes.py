"""What each process of `test_processes.py` runs: `python two_processes.py MODE ADDRESS ID FILE`.

`one_step` is also what the test runs in its own process, on one device, to compare with.
"""

import dataclasses
import os
import signal
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import tiny_model

import eqrl
from eqrl import algorithms, logprobs, models, samplers, sharding
from eqrl._prompts import pad_prompts
from eqrl.sharding.arrays import row_part, to_global, to_host
from eqrl.sharding.processes import is_first, own_prompts, start, together


# Parameters cut across processes, and everything at once.
MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2")
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]] * 2
SAMPLES = 2
HEARTBEAT = 10


def one_step(axes: str | None = None) -> dict[str, np.ndarray]:
    """One step of PPO with a critic, as NumPy: the whole of it, or this process's rows."""
    algorithm, optimizer = algorithms.ppo(), optax.adam(1e-3)
    policy = tiny_model(vocab=40)
    state = eqrl.init(policy, algorithm, optimizer, critic=models.ValueModel.init(policy))
    mesh = sharding.make_mesh(axes) if axes else None
    if mesh is None:
        return _step(state, algorithm, optimizer, None)
    with jax.set_mesh(mesh):
        state = sharding.place(state, mesh, policy.architecture)
        return _step(state, algorithm, optimizer, mesh)


def _step(state, algorithm, optimizer, mesh) -> dict[str, np.ndarray]:
    spread = (lambda x: x) if mesh is None else (lambda x: sharding.place_rows(x, mesh))
    implementation = logprobs.over_mesh(mesh) if mesh else None
    key = jax.random.key(5)
    prompts = _prompts(mesh)
    sampler, sampling = samplers.Decoder(), samplers.Sampling(SAMPLES, 6, (0, 1))
    best = dataclasses.replace(sampling, temperature=0)
    greedy = sampler(state.policy, prompts, best, key=key)
    rollout = sampler(state.policy, prompts, sampling, key=key)
    # Sample by sample, so that the completions of a prompt lie in different processes.
    order = np.arange(len(PROMPTS) * SAMPLES).reshape(-1, SAMPLES).T.ravel()
    rollout = spread(jax.tree.map(lambda x: x[order], rollout))
    rollout = dataclasses.replace(rollout, rewards=_rewards(rollout, mesh))
    rollout = eqrl.annotate(
        rollout,
        algorithm.requires | {"old_logprobs"},
        policy=state.policy,
        reference=state.policy,
        critic=state.critic,
        implementation=implementation,
        micro_batch=8,
    )
    outcome = eqrl.outcome(rollout.need("rewards")[:, 0], rollout.mask)
    batch, carried = jax.jit(algorithm.assign)(outcome, state.algorithm, rollout)
    # Groups are nothing to this algorithm; the same rollout has them.
    grouped = algorithms.grpo()
    by_group, _ = jax.jit(grouped.assign)(outcome, grouped.init(), rollout)
    state = dataclasses.replace(state, algorithm=carried)
    state, metrics = eqrl.update(
        state, spread(batch), algorithm, optimizer, implementation=implementation, micro_batch=8
    )
    found = to_host(
        dict(
            greedy=greedy.tokens,
            tokens=rollout.tokens,
            mask=rollout.mask,
            logprobs=rollout.logprobs,
            advantages=spread(batch).advantages,
            group_advantages=spread(by_group).advantages,
            **{name: metrics[name] for name in ("policy/entropy", "optim/grad_norm")},
        )
    )
    return found | _parameters(state, mesh)


def _prompts(mesh):
    """Each process tokenizes and pads its own prompts."""
    part, parts = row_part(mesh) if mesh else (0, 1)
    ids = own_prompts(range(len(PROMPTS)), part, parts)
    prompts = pad_prompts([PROMPTS[i] for i in ids], list(ids), width=4)
    return to_global(prompts, mesh) if mesh else prompts


def _rewards(rollout, mesh):
    """Each process rewards its own rows, outside of JAX."""
    tokens, mask = to_host((rollout.tokens, rollout.mask))
    rewards = (np.where(mask, tokens, 0).sum(1, keepdims=True) / 50).astype(np.float32)
    return to_global(rewards, mesh) if mesh else jnp.asarray(rewards)


def _parameters(state, mesh) -> dict[str, np.ndarray]:
    """Every parameter whole, in every process."""
    arrays = eqx.filter((state.policy, state.critic), eqx.is_array)
    if mesh is not None:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arrays = jax.jit(lambda x: x, out_shardings=whole)(arrays)
    return {f"parameter {i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(arrays))}


def _main(mode: str, address: str, process_id: int, file: str) -> None:
    signal.alarm(300)  # whatever happens to the test, nothing of it stays behind
    processes = start(
        address,
        2,
        process_id,
        start_timeout=3 if mode == "alone" else 100,
        heartbeat_timeout=HEARTBEAT,
        shutdown_timeout=60,
    )
    with together(processes):
        if mode == "step":
            results: dict = {f"{axes} {k}": v for axes in MESHES for k, v in one_step(axes).items()}
            np.savez(file, **results, first=is_first())
        else:
            _die(mode, process_id)


def _die(mode: str, process_id: int) -> None:
    """One process raises or is killed, while the other waits for it or is busy."""
    _meet()
    print(time.time(), "last seen", flush=True)
    if (mode, process_id) == ("raise", 1):
        raise RuntimeError("the reward server is down")
    if (mode, process_id) == ("kill", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "kill":
        time.sleep(600)
    _meet()


def _meet() -> None:
    mesh = sharding.make_mesh("fsdp=8")
    assert to_host(jnp.sum(to_global(np.ones(4, np.float32), mesh))) == 8


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
