"""What the algebra costs: estimators, selections and prepared statistics beside the update.

    python bench/algebra.py

Two batches: 65,536 completions of one token in groups of 8, and 1,024 completions of 4,096 tokens.
For each expression: seconds to compile (no cache), median seconds to run, and its share of the
update it belongs to. The update is that of the smallest model there is, the demo model, measured on
256 completions of 64 tokens and scaled by the number of tokens; any real model's update is longer,
and the share smaller.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqrl
from eqrl import algorithms, models


jax.config.update("jax_enable_compilation_cache", False)

ESTIMATORS = (
    "rloo() | whiten() | clip(5.0)",
    "group_norm()",
    "group_norm(deviation='others')",
    "group_norm() + 0.2 * batch_norm()",
    "kl_penalty(0.01) | returns() | whiten()",
    "kl_penalty(0.05) | gae() | whiten()",
    "turn_gae()",
    "pass_at_k(4)",
    "opo()",
    "gdpo() | batch_norm()",
    "optimal_token_baseline()",
    "ema_baseline()",
)
OBJECTIVES = (
    "kl_cov()",
    "clip_cov()",
    "m2po() * unclipped()",
    "top_entropy() * clipped()",
    "normalised(icepop()) * clipped()",
)
SHAPES = {"65,536 x 1": (65_536, 1), "1,024 x 4,096": (1024, 4096)}


def rollout_of(rows: int, width: int) -> tuple[jax.Array, eqrl.Rollout]:
    """Random numbers in every field; lengths from an eighth of the width to all of it."""
    rng = np.random.default_rng(0)
    real = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    length = rng.integers(max(1, width // 8), width + 1, rows)
    mask = jnp.asarray(np.arange(width)[None] < length[:, None])
    rewards = jnp.asarray(rng.integers(0, 2, (rows, 2)), jnp.float32)
    logprobs = -jnp.abs(real(rows, width))
    rollout = eqrl.Rollout(
        tokens=jnp.asarray(rng.integers(0, 1000, (rows, width)), jnp.int32),
        mask=mask,
        positions=jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width)),
        logprobs=logprobs,
        group=jnp.asarray(np.arange(rows) // 8 * 8, jnp.int32),
        truncated=jnp.zeros(rows, bool),
        rewards=rewards,
        old_logprobs=logprobs + 0.01 * real(rows, width),
        ref_logprobs=logprobs + 0.1 * real(rows, width),
        values=real(rows, width),
        old_entropy=jnp.abs(real(rows, width)),
        sum_pi_squared=jnp.abs(real(rows, width)),
        version=jnp.zeros(rows, jnp.int32),
        greedy_rewards=real(rows),
    )
    return eqrl.outcome(jnp.sum(rewards, axis=1), mask), rollout


def timed(function: Callable, *arguments) -> tuple[float, float]:
    """Seconds to compile, and the median of seven runs."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    runs = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        runs.append(time.perf_counter() - start)
    return compile_seconds, statistics.median(runs)


def update_seconds_per_token() -> float:
    """Of the demo model: forward, backward and AdamW, divided by trained tokens."""
    loaded = models.load("examples/demo_model")
    signal, rollout = rollout_of(256, 64)
    algorithm, optimizer = algorithms.grpo(kl=0), optax.adamw(1e-5)
    state = eqrl.init(loaded.model, algorithm, optimizer)
    batch, _ = algorithm.assign(signal, state.algorithm, rollout)
    runs = []
    for _ in range(4):
        start = time.perf_counter()
        state, metrics = eqrl.update(state, batch, algorithm, optimizer, micro_batch=64)
        jax.block_until_ready(metrics)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs[1:]) / float(jnp.sum(rollout.mask))


def main() -> None:
    per_token = update_seconds_per_token()
    print(f"update of the demo model: {1e6 * per_token:.0f} us a token\n")
    for name, shape in SHAPES.items():
        signal, rollout = rollout_of(*shape)
        update = per_token * float(jnp.sum(rollout.mask))
        print(f"{name}: the update takes {update:.0f} s\n")
        print("| expression | compile s | run ms | share of the update |")
        print("| --- | --- | --- | --- |")
        algorithm = algorithms.grpo(kl=0)
        batch, _ = jax.jit(algorithm.assign)(signal, algorithm.init(), rollout)
        for text in ESTIMATORS + OBJECTIVES:
            piece = eqrl.parse(text)
            if isinstance(piece, eqrl.AbstractTransform):
                arguments = (signal, piece.init(), rollout)
                compiling, running = timed(piece.update, *arguments)
            else:
                assert isinstance(piece, eqrl.AbstractTerm)
                compiling, running = timed(piece.prepare, batch, piece.init())
            share = 100 * running / update
            cell = text.replace("|", "\\|")
            print(f"| `{cell}` | {compiling:.2f} | {1e3 * running:.1f} | {share:.3f} % |")
        print()


if __name__ == "__main__":
    main()
