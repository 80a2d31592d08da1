"""Forward and backward of log-probs and entropy with the vocabulary in slices.

No `[token, vocab]` array exists, forward or backward. The forward pass keeps four numbers a token.
The backward pass recomputes each slice of the logits and turns it at once into the loss's
derivative by it, from which two matrix products give that slice's share of both gradients. That is
four products in all where stored logits need three, and memory for one slice.

What differs between implementations is two steps, in `Kernels`; slices, gradients and devices are
the same for all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._types import ScalarLike, wide
from .layout import Layout
from .online import Row, Seen, Tile, contract, merge, outcome


Rows: TypeAlias = Float[Array, "row width"]


class Kernels(NamedTuple):
    """The two steps that touch logits.

    Both take `hidden[token, width]`, some rows of the unembedding, `targets[token, 1]` counted
    from the first of these rows, which `columns` count, `live[token, 1]` (False: the caller reads
    nothing of this token; a kernel may skip it), 1 / temperature and the soft cap.

    Attributes:
        absorb: takes the size of a slice besides, which a kernel with tiles of its own ignores,
            and gives `Seen` of all rows.
        differentiate: takes `Row` besides and gives the derivative by `hidden @ rows.T`, in
            `hidden`'s type; zero where `columns` do not count or a token is not live.
    """

    absorb: Callable[..., Seen]
    differentiate: Callable[..., Tile]


@dataclasses.dataclass(frozen=True)
class How:
    """What is fixed when a program is compiled."""

    kernels: Kernels
    size: int
    soft_cap: float | None
    layout: Layout | None


def streamed(
    kernels: Kernels,
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike,
    soft_cap: float | None,
    mask: Bool[Array, " token"] | None,
    size: int | None,
    layout: Layout | None,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """Log-probs and entropies by `kernels`; see `token_logprobs`.

    Args:
        size: unembedding rows a slice of the backward pass; chosen by the number of tokens if
            `None`.
        layout: of tokens and vocabulary; one device if `None`.
    """
    dtype = wide(hidden.dtype)
    live = jnp.ones(targets.shape, bool) if mask is None else mask
    tokens, vocab = hidden.shape[0], unembedding.shape[0]
    if layout is not None:
        tokens, vocab = layout.local(tokens, vocab)
    size = slice_size(tokens, vocab) if size is None else min(size, vocab)
    how = How(kernels, size, soft_cap, layout)
    logprob, entropy = _streamed(  # pyright: ignore[reportGeneralTypeIssues]
        how,
        hidden,
        unembedding,
        targets.astype(jnp.int32)[:, None],
        live[:, None],
        1 / jnp.asarray(temperature, dtype),
    )
    return logprob[:, 0], entropy[:, 0]


def slice_size(tokens: int, vocab: int) -> int:
    """Rows of the unembedding a slice of the backward pass.

    A slice of s rows is 6 s d FLOPs a token, and 12 d + 6 s bytes in bfloat16: hidden states twice,
    their gradient in float32 to and fro, and the slice's derivative once out and twice in. At 2,048
    rows that is 680 FLOPs a byte for d = 2,048, above every chip's ridge; more only takes memory.
    On CPU 4,096 were the fastest and the smallest in trials. As many slices as that makes are then
    cut to equal size, for rows that two of them hold are computed twice.
    """
    most = 4096 if tokens <= 16384 else 2048
    count = -(-vocab // most)
    return min(vocab, -(-vocab // count // 128) * 128)


def _run(how: How, local: Callable, hidden, unembedding, *per_token):
    """`local` on this device, or on every device with its part of the arrays."""
    if how.layout is None:
        return local(hidden, unembedding, *per_token)
    return how.layout.run(local, hidden, unembedding, *per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _streamed(how: How, hidden, unembedding, targets, live, inverse):
    return _forward(how, hidden, unembedding, targets, live, inverse)[0]


def _forward(how: How, hidden, unembedding, targets, live, inverse):
    vocab = unembedding.shape[0]

    def local(hidden, unembedding, targets, live, inverse):
        first, valid = _own(how, vocab, unembedding)
        columns = jnp.stack([jnp.zeros_like(valid), valid])
        seen = how.kernels.absorb(
            hidden, unembedding, targets - first, columns, live, inverse, how.soft_cap, how.size
        )
        if how.layout is not None and how.layout.vocab is not None:
            over = how.layout.vocab
            seen = merge(seen, lambda x: lax.pmax(x, over), lambda x: lax.psum(x, over), inverse)
        logprob, entropy, log_mass = outcome(seen, inverse)
        return logprob, entropy, seen.maximum, log_mass

    logprob, entropy, *kept = _run(how, local, hidden, unembedding, targets, live, inverse)
    residuals = (hidden, unembedding, targets, live, inverse, entropy, *kept)
    return (logprob, entropy), residuals


def _own(how: How, vocab: int, unembedding: Rows):
    """Number of the first vocabulary entry held here, and how many of the rows here are entries."""
    rows = unembedding.shape[0]
    first = jnp.zeros((), jnp.int32)
    if how.layout is not None and how.layout.vocab is not None:
        first = lax.axis_index(how.layout.vocab).astype(jnp.int32) * rows
    return first, jnp.clip(vocab - first, 0, rows)


def slices(rows: int, size: int):
    """Start of each slice, and the first row of it that no earlier slice has covered.

    The last slice is moved back to end at the last row, so that all have one shape.
    """
    index = jnp.arange(-(-rows // size), dtype=jnp.int32)
    start = jnp.minimum(index * size, rows - size)
    return start, index * size - start


def _backward(how: How, residuals, cotangents):
    hidden, unembedding, targets, live, inverse, entropy, maximum, log_mass = residuals
    vocab = unembedding.shape[0]
    of_logprob, of_entropy = (jnp.where(live, x, 0) for x in cotangents)
    row = Row(maximum, log_mass, entropy, of_logprob, of_entropy)

    def local(hidden, unembedding, targets, live, inverse, *row):
        first, valid = _own(how, vocab, unembedding)
        targets = targets - first

        def step(carry, where):
            of_hidden, of_unembedding = carry
            start, fresh = where
            rows = lax.dynamic_slice_in_dim(unembedding, start, how.size)
            columns = jnp.stack([fresh, jnp.clip(valid - start, 0, how.size)])
            of_product = how.kernels.differentiate(
                hidden, rows, targets - start, columns, live, inverse, how.soft_cap, Row(*row)
            )
            of_rows = contract("tv,td->vd", of_product, hidden, inverse.dtype).astype(
                unembedding.dtype
            )
            return (
                of_hidden + contract("tv,vd->td", of_product, rows, inverse.dtype),
                lax.dynamic_update_slice_in_dim(of_unembedding, of_rows, start, axis=0),
            ), None

        carry = jnp.zeros(hidden.shape, inverse.dtype), jnp.zeros_like(unembedding)
        # Backwards, so that rows which two slices hold are last written by the one that counts
        # them: nothing is read back, and a narrow type loses nothing.
        (of_hidden, of_unembedding), _ = lax.scan(
            step, carry, slices(unembedding.shape[0], how.size), reverse=True
        )
        if how.layout is not None:
            of_hidden, of_unembedding = how.layout.total(of_hidden, of_unembedding)
        return of_hidden.astype(hidden.dtype), of_unembedding

    of_hidden, of_unembedding = _run(how, local, hidden, unembedding, targets, live, inverse, *row)
    # The temperature is a setting of the sampler, not something to learn: no gradient.
    return of_hidden, of_unembedding, None, None, jnp.zeros_like(inverse)


_streamed.defvjp(_forward, _backward)
