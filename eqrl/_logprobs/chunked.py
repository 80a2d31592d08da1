"""Online softmax over slices of the vocabulary, in plain JAX: right on every platform."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._types import ScalarLike
from .layout import Layout
from .online import Seen, absorb, contract, differentiate, narrowed, nothing, squash
from .stored import stored
from .streamed import Kernels, slices, streamed


# Logits that may be kept.
_KEPT = 8192 * 4096


def chunked(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, " token"] | None = None,
    size: int | None = None,
    layout: Layout | None = None,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Holds `[token, size]` arrays.

    Args:
        size: vocabulary entries a slice; `slice_size` of the tokens by default. Where all logits
            take no more memory than one slice of 8,192 tokens (128 MiB), there is but one by
            default, and it is kept, which saves the backward pass a matrix product.
        layout: of tokens and vocabulary on a mesh.
    """
    if size is None and layout is None and targets.size * unembedding.shape[0] <= _KEPT:
        return stored(
            hidden, unembedding, targets, temperature=temperature, soft_cap=soft_cap, mask=mask
        )
    return streamed(
        KERNELS,
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        soft_cap=soft_cap,
        mask=mask,
        size=size,
        layout=layout,
    )


def _logits(hidden, rows, columns, targets, dtype, soft_cap):
    """Some entries' logits before the temperature, which of them count, and where the target is."""
    product = contract("td,vd->tv", hidden, rows, dtype)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)[None, :]
    counts = (columns[0] <= index) & (index < columns[1])
    return squash(product, soft_cap), counts, index == targets


def _absorb(hidden, unembedding, targets, columns, live, inverse, soft_cap, size) -> Seen:
    del live  # of masked tokens the caller has compacted away what it can

    def step(seen, where):
        start, fresh = where
        rows = lax.dynamic_slice_in_dim(unembedding, start, size)
        here = jnp.stack([jnp.maximum(fresh, columns[0] - start), columns[1] - start])
        x, counts, hit = _logits(hidden, rows, here, targets - start, inverse.dtype, soft_cap)
        return absorb(seen, x, counts, hit, inverse), None

    seen = nothing(hidden.shape[0], inverse.dtype)
    return lax.scan(step, seen, slices(unembedding.shape[0], size))[0]


def _differentiate(hidden, rows, targets, columns, live, inverse, soft_cap, row):
    del live  # their cotangents are 0
    x, counts, hit = _logits(hidden, rows, columns, targets, inverse.dtype, soft_cap)
    return narrowed(differentiate(x, counts, hit, row, inverse, soft_cap), hidden.dtype)


KERNELS = Kernels(_absorb, _differentiate)
