"""Time of log-probs and entropy beside the matrix products they are made of.

    python bench/logprobs.py

Times the forward pass, and value with both gradients, of every implementation that runs on this
device, in alternation, and the plain matrix products of the same sizes in the same run: four of
them are what an implementation must do that keeps no logits (one forward, one again, and one for
each gradient). The medians go to docs/benchmarks/logprobs-<platform>.md. On CPU the sizes are those
at which the definition still fits; on a GPU or TPU those of Qwen2.5-3B and 7B.
"""

import functools
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import eqrl


ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {
    "cpu": [
        (2_048, 128, 512, "float32"),
        (1_024, 256, 2_048, "float32"),
        (512, 576, 8_192, "float32"),
        (512, 576, 49_152, "float32"),
        (512, 576, 49_152, "bfloat16"),
        (256, 896, 151_936, "float32"),
        (256, 896, 151_936, "bfloat16"),
    ],
    "gpu": [
        (tokens, width, 151_936, "bfloat16")
        for width in (2_048, 3_584)
        for tokens in (8_192, 32_768)
    ],
}
SIZES["tpu"] = SIZES["gpu"]
ROUNDS = {"cpu": 9, "gpu": 20, "tpu": 20}
# Columns of the matrix product that is measured; the time of the whole one follows.
COLUMNS = 16_384


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def programs(implementation, hidden, head, targets) -> dict[str, Callable]:
    """The forward pass, and value with both gradients; compiled, or nothing if it does not fit."""

    def loss(hidden, head):
        values = eqrl.token_logprobs(hidden, head, targets, implementation=implementation)
        return jnp.sum(values[0]) + 0.3 * jnp.sum(values[1])

    both = jax.value_and_grad(loss, (0, 1))
    return {
        name: jax.jit(function).lower(hidden, head).compile()
        for name, function in {"forward": loss, "both": both}.items()
    }


def measure(tokens: int, width: int, vocab: int, dtype: str, where: str) -> list[str]:
    """The table's rows of one size."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.float32).astype(dtype)
    head = (0.05 * jax.random.normal(keys[1], (vocab, width), jnp.float32)).astype(dtype)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    names = ["reference", "chunked"] + ["pallas"] * (where != "cpu")
    compiled, failed = {}, {}
    for name in names:
        try:
            compiled[name] = programs(name, hidden, head, targets)
            for program in compiled[name].values():
                jax.block_until_ready(program(hidden, head))
        except jax.errors.JaxRuntimeError as error:  # out of memory
            compiled.pop(name, None)
            failed[name] = str(error).split(":")[0]
    columns = min(COLUMNS, vocab)
    # jax 0.10.2 is slow on CPU where bfloat16 is both read and written.
    result = jnp.float32 if where == "cpu" else dtype
    product = jax.jit(functools.partial(jnp.einsum, "td,vd->tv", preferred_element_type=result))
    jax.block_until_ready(product(hidden, head[:columns]))
    runs: dict[str, list[float]] = {}
    for _ in range(ROUNDS[where]):
        for name, parts in compiled.items():
            for part, program in parts.items():
                runs.setdefault(f"{name} {part}", []).append(seconds(program, hidden, head))
        runs.setdefault("product", []).append(seconds(product, hidden, head[:columns]))
    return [*rows(tokens, width, vocab, dtype, compiled, runs, vocab / columns)] + [
        f"| {tokens:,} | {width:,} | {vocab:,} | {dtype} | {name} | {reason} | | | | |"
        for name, reason in failed.items()
    ]


def rows(tokens, width, vocab, dtype, compiled, runs, scale):
    """Markdown, a row an implementation."""
    product = statistics.median(runs["product"]) * scale
    base = runs.get("reference both")
    for name, parts in compiled.items():
        both = runs[f"{name} both"]
        paired = (
            f"{statistics.median(a / b for a, b in zip(both, base, strict=True)):.2f}"
            if base
            else "-"
        )
        memory = parts["both"].memory_analysis().temp_size_in_bytes / 2**20
        middle = statistics.median(both)
        forward = statistics.median(runs[f"{name} forward"])
        yield (
            f"| {tokens:,} | {width:,} | {vocab:,} | {dtype} | {name} | {forward * 1e3:,.1f} "
            f"| {middle * 1e3:,.1f} | {paired} | {middle / (4 * product):.2f} | {memory:,.0f} |"
        )


def main() -> None:
    where = jax.default_backend()
    text = [
        f"# Time of the log-probs on {where}",
        "",
        f"{time.strftime('%Y-%m-%d')}; {jax.devices()[0].device_kind}; jax {jax.__version__}; "
        f"Python {platform.python_version()}. Made by `python bench/logprobs.py`.",
        "Medians of paired runs. Forward: log-probs and entropy; both: value and gradients by",
        "hidden states and head. The column before the last divides by four matrix products of the",
        "same size and type, timed in the same run.",
        "",
        "| tokens | width | vocabulary | inputs | implementation | forward, ms | both, ms "
        "| both / reference | both / 4 products | temporary MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(text), flush=True)
    for size in SIZES[where]:
        found = measure(*size, where)
        print("\n".join(found), flush=True)
        text += found
    if "--print-only" not in sys.argv:
        path = ROOT / "docs" / "benchmarks" / f"logprobs-{where}.md"
        path.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
