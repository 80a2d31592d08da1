"""Logits computed once and kept for the backward pass: what is fastest where they are few."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._types import ScalarLike, wide
from .online import Row, absorb, contract, differentiate, nothing, outcome, squash


def stored(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, " token"] | None = None,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Keeps one `[token, vocab]` array; `reference` holds several."""
    del mask  # of masked tokens the caller has compacted away what it can
    inverse = 1 / jnp.asarray(temperature, wide(hidden.dtype))
    logprob, entropy = _stored(  # pyright: ignore[reportGeneralTypeIssues]
        soft_cap, hidden, unembedding, targets.astype(jnp.int32)[:, None], inverse
    )
    return logprob[:, 0], entropy[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored(soft_cap, hidden, unembedding, targets, inverse):
    return _forward(soft_cap, hidden, unembedding, targets, inverse)[0]


def _flags(targets, vocab: int):
    return jnp.ones((1, vocab), bool), jnp.arange(vocab, dtype=jnp.int32)[None, :] == targets


def _forward(soft_cap, hidden, unembedding, targets, inverse):
    product = contract("td,vd->tv", hidden, unembedding, inverse.dtype)
    z = squash(product, inverse, soft_cap)
    seen = absorb(nothing(z.shape[0], z.dtype), z, *_flags(targets, z.shape[1]))
    logprob, entropy, log_mass = outcome(seen)
    kept = hidden, unembedding, targets, inverse, z, seen.maximum, log_mass, entropy
    return (logprob, entropy), kept


def _backward(soft_cap, kept, cotangents):
    hidden, unembedding, targets, inverse, z, *distribution = kept
    row = Row(*distribution, *cotangents)
    of_product = differentiate(z, *_flags(targets, z.shape[1]), row, inverse, soft_cap)
    of_product = of_product.astype(hidden.dtype)

    return (
        contract("tv,vd->td", of_product, unembedding, inverse.dtype).astype(hidden.dtype),
        contract("tv,td->vd", of_product, hidden, inverse.dtype).astype(unembedding.dtype),
        None,
        jnp.zeros_like(inverse),
    )


_stored.defvjp(_forward, _backward)
