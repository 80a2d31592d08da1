"""Log-probs, entropy and their gradients in float64 NumPy, and one way to ask an implementation."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import LOGPROB_TOLERANCE


def inputs(tokens, width, vocab, dtype="float32", scale=2.0):
    """Hidden states, head and targets; logits have about the standard deviation `scale`."""
    rng = np.random.default_rng([tokens, width, vocab])
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * scale, dtype)
    head = jnp.asarray(rng.normal(size=(vocab, width)) / np.sqrt(width), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)


def cotangents(tokens):
    """Of log-probs and entropies."""
    return np.random.default_rng(tokens).normal(size=(2, tokens)).astype(np.float32)


def oracle(hidden, head, targets, cotangents, temperature=1.0, soft_cap=None):
    """Log-probs, entropies, and the gradients of their products with the cotangents."""
    h, w = (np.asarray(x.astype(jnp.result_type(float)), np.float64) for x in (hidden, head))
    product = h @ w.T
    z = product if soft_cap is None else soft_cap * np.tanh(product / soft_cap)
    z = z / temperature
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p, here = np.exp(log_p), (np.arange(len(h)), np.asarray(targets))
    entropy = -(p * log_p).sum(axis=1, keepdims=True)
    of_logprob, of_entropy = np.asarray(cotangents, np.float64)[:, :, None]
    of_z = -p * (of_logprob + of_entropy * (log_p + entropy))
    of_z[here] += of_logprob[:, 0]
    of_product = of_z / temperature
    if soft_cap is not None:
        of_product *= 1 - np.tanh(product / soft_cap) ** 2
    return log_p[here], entropy[:, 0], of_product @ w, of_product.T @ h


def ask(function, hidden, head, targets, cotangents, **options):
    """What `oracle` gives, of an implementation."""

    def both(hidden, head):
        return function(hidden, head, targets, **options)

    @jax.jit
    def values_and_gradients(hidden, head):
        values, pull = jax.vjp(both, hidden, head)
        return *values, *pull(tuple(jnp.asarray(x, values[0].dtype) for x in cotangents))

    return values_and_gradients(hidden, head)


def check(got, want, dtype):
    """Values to the table's tolerance, gradients to that of their largest entry."""
    summed = "float64" if dtype == "float64" else "float32"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == (summed if i < 2 else dtype)
        # Products of bfloat16 are exact in float32: only gradients are rounded.
        rtol, atol = LOGPROB_TOLERANCE[summed if i < 2 else dtype]
        scale = 1 if i < 2 else max(np.abs(b).max(), 1e-30)
        if i == 3 and dtype == "bfloat16":
            # Rows of no target are far smaller than those of targets, and a tolerance for bfloat16
            # would not see them.
            rows = np.abs(b).max(axis=1, keepdims=True)
            scale = np.maximum(4 * rows, 1e-6 * scale)
        got = np.asarray(a.astype(summed), np.float64)
        far = np.abs(got - b) > rtol * np.abs(b) + atol * scale
        assert not far.any() and np.isfinite(got).all(), (i, far.sum(), np.abs(got - b).max())
