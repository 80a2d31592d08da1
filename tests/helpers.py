"""Small models and rollouts that several tests share, and the only tolerances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eqrl._types import Rollout
from eqrl.models import Architecture, Transformer


# Agreement of two ways to compute the same float32 numbers.
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
# (rtol, atol) of log-probs, entropies and their gradients against float64, by the inputs' type.
# Gradients of bfloat16 inputs are rounded to 8 bits, twice.
LOGPROB_TOLERANCE = {"float32": (2e-5, 2e-5), "bfloat16": (1e-2, 5e-3), "float64": (1e-9, 1e-10)}


def close(a, b, *, scale: float = 1.0) -> None:
    """`a` equals `b` to the tolerance of `a`'s type; NaN never passes."""
    a, b = np.asarray(a), np.asarray(b)
    tolerance = TOLERANCE[str(a.dtype)] * scale
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def label(x) -> str:
    """The id of a parameter: a function's name, where `repr` would show its address."""
    if isinstance(x, functools.partial):
        return f"{label(x.func)}-{x.keywords}"
    return getattr(x, "__name__", None) or repr(x)


def tiny_model(
    key=None, *, vocab: int = 37, tied: bool = True, head_dim: int = 4, dtype=jnp.float32
) -> Transformer:
    """A Qwen2-shaped model of two layers with every option a decoder could get wrong."""
    architecture = Architecture(
        family="qwen2",
        vocab_size=vocab,
        width=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        ff_width=24,
        tied=tied,
        attention_bias=True,
    )
    key = jax.random.key(7) if key is None else key
    model = Transformer.init(architecture, key=key, dtype=dtype)
    # Far from uniform, so that log-probs differ between tokens.
    return jax.tree.map(lambda x: x * 6 if x.ndim >= 2 else x + 0.1, model)


def sampled_rollout(seed: int, groups: int = 3, samples: int = 2, time: int = 9, vocab: int = 37):
    """Random rows with prompts, gaps in the mask, padding at both ends, and an empty row."""
    rng = np.random.default_rng(seed)
    rows = groups * samples
    positions = np.full((rows, time), -1)
    mask = np.zeros((rows, time), bool)
    for row in range(rows):
        start = rng.integers(0, 2)
        stop = rng.integers(time - 3, time)
        positions[row, start:stop] = np.arange(stop - start)
        mask[row, start + 2 : stop] = rng.random(stop - start - 2) < 0.8
        mask[row, stop - 1] = True
    mask[rows - 1] = False
    return Rollout(
        tokens=jnp.asarray(rng.integers(0, vocab, (rows, time)), jnp.int32),
        mask=jnp.asarray(mask),
        positions=jnp.asarray(positions, jnp.int32),
        logprobs=jnp.asarray(-rng.random((rows, time)), jnp.result_type(float)),
        group=jnp.asarray(np.repeat(np.arange(groups) * samples, samples), jnp.int32),
        truncated=jnp.asarray(rng.random(rows) < 0.3),
        rewards=jnp.asarray(rng.integers(0, 2, (rows, 2)), jnp.result_type(float)),
    )
