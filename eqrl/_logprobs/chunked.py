"""Online softmax over slices of the vocabulary: no `[token, vocab]` array, forward or backward.

The forward pass keeps four numbers a token: the running maximum m, mass = sum e^{z-m},
s = sum e^{z-m} z, and the target's logit. The backward pass recomputes each slice of the logits
and turns it at once into its share of both gradients. So it costs four matrix products where
stored logits cost three, and memory for one slice. The last slice of a vocabulary that is no
multiple of the slice is moved back to end at the last row, and the overlap is masked.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._types import ScalarLike, wide


# Vocabulary rows a slice. 4,096 was both the fastest and the smallest in the trials on CPU.
SLICE = 4096


def chunked(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    temperature: ScalarLike,
    *,
    size: int = SLICE,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Holds `[token, size]` arrays."""
    accumulate = wide(hidden.dtype)
    inverse = 1.0 / jnp.asarray(temperature, accumulate)
    size = min(size, unembedding.shape[0])
    return _chunked(hidden, unembedding, targets.astype(jnp.int32), inverse, size)


def _slices(vocab: int, size: int):
    """Start of each slice, and the first column of it that no earlier slice has covered."""
    index = jnp.arange(-(-vocab // size), dtype=jnp.int32)
    start = jnp.minimum(index * size, vocab - size)
    return start, index * size - start


def _logits(hidden, unembedding, start, fresh, inverse, size):
    """One slice of the logits, its weight rows, and which columns count."""
    rows = lax.dynamic_slice_in_dim(unembedding, start, size)
    z = jnp.einsum("td,vd->tv", hidden, rows, preferred_element_type=inverse.dtype) * inverse
    return z, rows, jnp.arange(size, dtype=jnp.int32)[None, :] >= fresh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, unembedding, targets, inverse, size):
    return _forward(hidden, unembedding, targets, inverse, size)[0]


def _forward(hidden, unembedding, targets, inverse, size):
    tokens, dtype = hidden.shape[0], inverse.dtype

    def step(carry, where):
        m, mass, s, chosen = carry
        start, fresh = where
        z, _, counts = _logits(hidden, unembedding, start, fresh, inverse, size)
        z = jnp.where(counts, z, -jnp.inf)
        new = jnp.maximum(m, jnp.max(z, axis=1))
        p = jnp.exp(z - new[:, None])
        shrink = jnp.exp(m - new)
        mass = mass * shrink + jnp.sum(p, axis=1)
        s = s * shrink + jnp.sum(p * jnp.where(counts, z, 0.0), axis=1)
        column = targets - start
        inside = (column >= fresh) & (column < size)
        picked = jnp.take_along_axis(z, jnp.clip(column, 0, size - 1)[:, None], axis=1)[:, 0]
        return (new, mass, s, jnp.where(inside, picked, chosen)), None

    zeros = jnp.zeros((tokens,), dtype)
    initial = (jnp.full((tokens,), -jnp.inf, dtype), zeros, zeros, zeros)
    (m, mass, s, chosen), _ = lax.scan(step, initial, _slices(unembedding.shape[0], size))
    lse = m + jnp.log(mass)
    entropy = lse - s / mass
    return (chosen - lse, entropy), (hidden, unembedding, targets, inverse, lse, entropy)


def _backward(size, residuals, cotangents):
    hidden, unembedding, targets, inverse, lse, entropy = residuals
    of_logprob, of_entropy = cotangents

    def step(carry, where):
        of_hidden, of_unembedding = carry
        start, fresh = where
        z, rows, counts = _logits(hidden, unembedding, start, fresh, inverse, size)
        log_p = z - lse[:, None]
        p = jnp.exp(log_p)
        onehot = (targets - start)[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]
        # d logp / dz = onehot - p;   d H / dz = -p (log p + H)
        of_z = of_logprob[:, None] * (onehot.astype(p.dtype) - p)
        of_z = of_z - of_entropy[:, None] * p * (log_p + entropy[:, None])
        of_z = (jnp.where(counts, of_z, 0.0) * inverse).astype(hidden.dtype)
        of_hidden = of_hidden + jnp.einsum(
            "tv,vd->td", of_z, rows, preferred_element_type=of_hidden.dtype
        )
        of_rows = jnp.einsum("tv,td->vd", of_z, hidden, preferred_element_type=of_hidden.dtype)
        old = lax.dynamic_slice_in_dim(of_unembedding, start, size)
        of_unembedding = lax.dynamic_update_slice_in_dim(
            of_unembedding, old + of_rows, start, axis=0
        )
        return (of_hidden, of_unembedding), None

    dtype = inverse.dtype
    initial = (jnp.zeros(hidden.shape, dtype), jnp.zeros(unembedding.shape, dtype))
    (of_hidden, of_unembedding), _ = lax.scan(step, initial, _slices(unembedding.shape[0], size))
    # The temperature is a setting of the sampler, not something to learn: no gradient.
    return (
        of_hidden.astype(hidden.dtype),
        of_unembedding.astype(unembedding.dtype),
        None,
        jnp.zeros_like(inverse),
    )


_chunked.defvjp(_forward, _backward)
