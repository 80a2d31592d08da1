"""Seconds of a GRPO step and tokens a second of sampling, on SmolLM2-135M or the demo model.

    python bench/step.py --model smollm2

The shapes are those of the comparison with TRL: 4 prompts x 4 samples x 64 tokens for the step,
8 x 4 x 64 for sampling alone; float32, prompts from word problems with the model's chat template.
Nothing stops a completion, so every run decodes the same number of tokens. Prints medians, the
matrix-product peak measured in the same run, and the share of it that the update's needed FLOPs
make up.
"""

import argparse
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import eqrl
from eqrl import algorithms, data, models, samplers


def median_of(function, repeat: int) -> float:
    function()  # compiles
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak() -> float:
    """GFLOP/s of a float32 product of the update's typical shape."""
    a, b = jnp.ones((2048, 896)), jnp.ones((896, 4864))
    product = jax.jit(jnp.matmul)
    return 2 * 2048 * 896 * 4864 / median_of(lambda: product(a, b), 15) / 1e9


def prompts_of(loaded, count: int) -> eqrl.Prompts:
    tokenizer = models.load_tokenizer(loaded)
    question = (
        "Natalia has {n} boxes with {m} clips in each and gives half of all clips to her friends, "
        "who share them equally. How many clips does she keep, and how did you find it out?"
    )
    questions = [question.format(n=3 + i, m=10 + 2 * i) for i in range(count)]
    return eqrl.pad_prompts(data.encode_prompts(questions, tokenizer), range(count))


def flops(loaded, rollout: eqrl.Rollout) -> float:
    """Needed by forward and backward: 6 a parameter and token, the head on trained tokens only."""
    facts = loaded.architecture
    head = facts.vocab_size * facts.width
    total = sum(x.size for x in jax.tree.leaves(loaded.model))
    body = total - head * (1 if facts.tied else 2)
    tokens = float((np.asarray(rollout.positions) >= 0).sum())
    return 6 * (body * tokens + head * float(np.asarray(rollout.mask).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    demo = "examples/demo_model"
    loaded = models.load(demo if options.model == "demo" else options.model)
    print(f"{options.model}: jax {jax.__version__}, {jax.devices()[0]}, {sys.version.split()[0]}")
    peak = matmul_peak()
    print(f"float32 matrix product: {peak:.0f} GFLOP/s")

    never = (loaded.architecture.vocab_size + 1,)
    decode, wide = samplers.Decoder(), samplers.Sampling(4, options.tokens, never)
    batch = prompts_of(loaded, 8)
    seconds = median_of(lambda: decode(loaded.model, batch, wide, key=jr.key(0)), options.repeat)
    print(f"sampling 8 x 4 x {options.tokens}: {seconds:.2f} s, "
          f"{32 * options.tokens / seconds:.0f} tokens/s")  # fmt: skip

    algorithm, optimizer = algorithms.grpo(kl=0), optax.adamw(1e-6)
    state = eqrl.init(loaded.model, algorithm, optimizer)
    batch = prompts_of(loaded, 4)
    generate, update = [], []
    for step in range(options.repeat + 1):
        start = time.perf_counter()
        rollout = decode(state.policy, batch, wide, key=jr.key(step))
        jax.block_until_ready(rollout)
        middle = time.perf_counter()
        rollout = eqrl.compact(rollout)
        reward = jnp.asarray(np.random.default_rng(step).integers(0, 2, 16), jnp.float32)
        signal = eqrl.outcome(reward, rollout.mask)
        assigned, _ = algorithm.assign(signal, state.algorithm, rollout)
        state, metrics = eqrl.update(state, assigned, algorithm, optimizer)
        jax.block_until_ready(metrics)
        generate.append(middle - start)
        update.append(time.perf_counter() - middle)
    generate, update = statistics.median(generate[1:]), statistics.median(update[1:])
    needed = flops(loaded, rollout)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"GRPO step 4 x 4 x {options.tokens}, rows of {rollout.tokens.shape[1]}: "
          f"{generate + update:.2f} s = generate {generate:.2f} + update {update:.2f}")  # fmt: skip
    print(f"update needs {needed / 1e12:.2f} TFLOP: {needed / update / 1e9:.0f} GFLOP/s, "
          f"{needed / update / 1e9 / peak:.0%} of the matrix product's")  # fmt: skip
    print(f"peak memory {peak_gb:.2f} GB")


if __name__ == "__main__":
    main()
