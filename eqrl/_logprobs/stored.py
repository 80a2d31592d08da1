"""Logits computed once and kept for the backward pass: what is fastest where they are few."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._types import ScalarLike, wide
from .online import Row, absorb, contract, differentiate, narrowed, nothing, outcome, squash


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
    live = jnp.ones(targets.shape, bool) if mask is None else mask
    inverse = 1 / jnp.asarray(temperature, wide(hidden.dtype))
    logprob, entropy = _stored(  # pyright: ignore[reportGeneralTypeIssues]
        soft_cap, hidden, unembedding, targets.astype(jnp.int32)[:, None], live[:, None], inverse
    )
    return logprob[:, 0], entropy[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stored(soft_cap, hidden, unembedding, targets, live, inverse):
    return _forward(soft_cap, hidden, unembedding, targets, live, inverse)[0]


def _flags(targets, vocab: int):
    return jnp.ones((1, vocab), bool), jnp.arange(vocab, dtype=jnp.int32)[None, :] == targets


def _forward(soft_cap, hidden, unembedding, targets, live, inverse):
    product = contract("td,vd->tv", hidden, unembedding, inverse.dtype)
    x = squash(product, soft_cap)
    seen = absorb(nothing(x.shape[0], x.dtype), x, *_flags(targets, x.shape[1]), inverse)
    logprob, entropy, log_mass = outcome(seen, inverse)
    kept = hidden, unembedding, targets, live, inverse, x, seen.maximum, log_mass, entropy
    return (logprob, entropy), kept


def _backward(soft_cap, kept, cotangents):
    hidden, unembedding, targets, live, inverse, x, *distribution = kept
    row = Row(*distribution, *(jnp.where(live, of, 0) for of in cotangents))
    of_product = differentiate(x, *_flags(targets, x.shape[1]), row, inverse, soft_cap)
    of_product = narrowed(of_product, hidden.dtype)

    return (
        contract("tv,vd->td", of_product, unembedding, inverse.dtype).astype(hidden.dtype),
        contract("tv,td->vd", of_product, hidden, inverse.dtype).astype(unembedding.dtype),
        None,
        None,
        jnp.zeros_like(inverse),
    )


_stored.defvjp(_forward, _backward)
