"""The arithmetic of a softmax whose vocabulary arrives in tiles; every kernel body calls it.

Of the columns seen so far it keeps four numbers a token: the largest logit m, the mass
sum e^{z-m}, the spread sum e^{z-m} (z-m), and the target's logit. Log-prob and entropy follow from
differences to m only, so logits of +-1e4 cost no digits. Logits are kept before the temperature
divides them, and differences are divided: rounded products would differ from one program to the
next, and e^{z-m} with them.

Everything here is elementwise or reduces along a tile's columns, in shapes `[token, 1]` and
`[token, column]`, so that it traces inside Mosaic and Triton kernels as well as in plain JAX.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


Tile: TypeAlias = Float[Array, "token column"]
Flags: TypeAlias = Bool[Array, "#token column"]
Column: TypeAlias = Float[Array, "token 1"]
Number: TypeAlias = Float[Array, ""]

# Below every logit. Not -inf: a difference of two infinities would be NaN, and so would be its
# product with 0, in the second derivative as well.
_FLOOR = -1e30


class Seen(NamedTuple):
    """What is known of a distribution after some of its columns."""

    maximum: Column
    mass: Column
    spread: Column
    chosen: Column


class Row(NamedTuple):
    """What the backward pass needs of each token: its distribution, and the cotangents.

    Attributes:
        maximum: the largest logit m.
        log_mass: log sum e^{z-m}.
        entropy: in nats.
        of_logprob: derivative of the loss by the log-prob.
        of_entropy: derivative of the loss by the entropy.
    """

    maximum: Column
    log_mass: Column
    entropy: Column
    of_logprob: Column
    of_entropy: Column


def nothing(tokens: int, dtype) -> Seen:
    """Before the first column."""
    zero = jnp.zeros((tokens, 1), dtype)
    return Seen(jnp.full((tokens, 1), _FLOOR, dtype), zero, zero, zero)


def contract(spec: str, a: Array, b: Array, dtype) -> Array:
    """A matrix product summed in `dtype`, of exact factors.

    Without HIGHEST, TPUs round float32 factors to bfloat16 and GPUs to TF32, and log-probs would be
    off by a hundredth of a nat. bfloat16 factors are exact at any precision, and cost the same.
    """
    a, b = (a, b) if a.dtype == b.dtype else (a.astype(dtype), b.astype(dtype))
    return jnp.einsum(spec, a, b, preferred_element_type=dtype, precision=lax.Precision.HIGHEST)


def narrowed(of_product: Tile, dtype) -> Tile:
    """A derivative in the inputs' type, for the products that follow.

    Not in float16: the derivative of one token of thousands is below its smallest number.
    """
    return of_product if dtype == jnp.float16 else of_product.astype(dtype)


def squash(product: Tile, soft_cap: float | None) -> Tile:
    r"""The logits before the temperature: $c \tanh(h w / c)$, or $h w$.

    Args:
        product: hidden states times unembedding rows.
        soft_cap: c, or `None`.
    """
    return product if soft_cap is None else soft_cap * jnp.tanh(product * (1 / soft_cap))


def absorb(seen: Seen, x: Tile, counts: Flags, hit: Flags, inverse: Number) -> Seen:
    """Adds the columns of one tile.

    Args:
        seen: of the tiles before.
        x: logits before the temperature.
        counts: False for columns that are not there, or were seen before.
        hit: True at the target of each token, if it is in this tile.
        inverse: 1 / temperature.
    """
    # In an order in which few tiles live at a time: with another, GPU kernels run out of registers.
    chosen = seen.chosen + jnp.sum(jnp.where(hit & counts, x, 0), axis=1, keepdims=True)
    x = jnp.where(counts, x, _FLOOR)
    maximum = jnp.maximum(seen.maximum, jnp.max(x, axis=1, keepdims=True))
    gap = (x - maximum) * inverse
    # Of columns that do not count e^gap is 0, unless none has counted so far.
    p = jnp.exp(gap)
    some = maximum > _FLOOR
    rescaled = _rescale(seen, maximum, inverse)
    return Seen(
        maximum,
        rescaled.mass + jnp.where(some, jnp.sum(p, axis=1, keepdims=True), 0),
        rescaled.spread + jnp.where(some, jnp.sum(p * gap, axis=1, keepdims=True), 0),
        chosen,
    )


def _rescale(seen: Seen, maximum, inverse: Number) -> Seen:
    """The same statistics relative to another, larger maximum."""
    gap = (seen.maximum - maximum) * inverse
    shrink = jnp.exp(gap)
    # Without mass there is nothing to move, and the gap may be huge.
    moved = jnp.where(seen.mass > 0, seen.spread + gap * seen.mass, 0)
    return Seen(maximum, seen.mass * shrink, moved * shrink, seen.chosen)


def merge(parts: Seen, largest: Callable, total: Callable, inverse: Number) -> Seen:
    """Statistics of disjoint parts of a vocabulary as those of the whole.

    Args:
        parts: of every part.
        largest: maximum over the parts, `x -> x`.
        total: sum over the parts.
        inverse: 1 / temperature.
    """
    maximum = largest(parts.maximum)
    moved = _rescale(parts, maximum, inverse)
    return Seen(maximum, total(moved.mass), total(moved.spread), total(parts.chosen))


def outcome(seen: Seen, inverse: Number) -> tuple[Column, Column, Column]:
    """Log-prob of the target, entropy, and log mass."""
    log_mass = jnp.log(seen.mass)
    logprob = (seen.chosen - seen.maximum) * inverse - log_mass
    return logprob, log_mass - seen.spread / seen.mass, log_mass


def differentiate(
    x: Tile, counts: Flags, hit: Flags, row: Row, inverse: Number, soft_cap: float | None
) -> Tile:
    """The derivative of the loss by `product`, of the same tile."""
    log_p = (x - row.maximum) * inverse - row.log_mass
    p = jnp.exp(log_p)
    # d logp / dz = [target] - p;   d H / dz = -p (log p + H)
    of_z = jnp.where(hit, row.of_logprob, 0) - p * (
        row.of_logprob + row.of_entropy * (log_p + row.entropy)
    )
    of_product = of_z * inverse
    if soft_cap is not None:
        # d c tanh(x / c) / dx = 1 - tanh^2
        of_product = of_product * (1 - (x * (1 / soft_cap)) ** 2)
    return jnp.where(counts, of_product, 0)
