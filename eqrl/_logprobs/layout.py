"""Where tokens and the output head lie on a mesh, and what that asks of a device."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

from .._types import wide


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens spread over some mesh axes, and the unembedding over others.

    Attributes:
        mesh: the devices.
        rows: axes that tokens are spread over; usually `("data", "fsdp")`.
        vocab: axis that the vocabulary is spread over, usually `"tensor"`, or `None`.
        width: axis that the unembedding's width is spread over, or `None`. It must be one of
            `rows`: each device then gathers its vocabulary entries before it uses them, and adds
            up the gradient of its part of the width only.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    vocab: str | None = None
    width: str | None = None

    def __post_init__(self):
        for name in (*self.rows, self.vocab, self.width):
            if name is not None and name not in self.mesh.axis_names:
                raise ValueError(f"axis {name!r} is not one of the mesh's {self.mesh.axis_names}")
        if self.vocab in self.rows or self.vocab is not None and self.vocab == self.width:
            raise ValueError(f"vocab={self.vocab!r} must be an axis of its own")
        if self.width is not None and self.width not in self.rows:
            raise ValueError(f"width={self.width!r} must be one of rows={self.rows}")

    def extent(self, *axes: str | None) -> int:
        """How many devices lie along these axes together."""
        return math.prod(self.mesh.shape[name] for name in axes if name is not None)

    def local(self, tokens: int, vocab: int) -> tuple[int, int]:
        """Tokens and vocabulary entries of one device, rounded up."""
        return -(-tokens // self.extent(*self.rows)), -(-vocab // self.extent(self.vocab))

    def run(self, local: Callable, hidden, unembedding, targets, live, inverse, *per_token):
        """`local` on every device, with its tokens and its vocabulary entries.

        Tokens and entries that do not divide are padded: with tokens that are not live, and entries
        beyond the vocabulary; the padding is cut off the results.

        Args:
            local: takes the arrays below as one device holds them. Gives arrays per token, or
                the pair of gradients by `hidden` and `unembedding`.
            hidden: `[token, width]`.
            unembedding: `[vocab, width]`.
            targets: `[token, 1]`.
            live: `[token, 1]`.
            inverse: a scalar.
            *per_token: more arrays `[token, 1]`.
        """
        tokens, vocab = hidden.shape[0], unembedding.shape[0]
        if unembedding.shape[1] % self.extent(self.width):
            raise ValueError(
                f"a width of {unembedding.shape[1]} does not divide among the "
                f"{self.extent(self.width)} devices of axis {self.width!r}; pass width=None"
            )
        more_tokens = -tokens % self.extent(*self.rows)
        more_vocab = -vocab % self.extent(self.vocab)
        hidden, targets, live, *per_token = (
            _pad(x, more_tokens) for x in (hidden, targets, live, *per_token)
        )
        unembedding = _pad(unembedding, more_vocab)
        row, head = P(self.rows, None), P(self.vocab, self.width)

        def gathered(hidden, unembedding, *rest):
            if self.width is not None:
                unembedding = lax.all_gather(unembedding, self.width, axis=1, tiled=True)
            return local(hidden, unembedding, *rest)

        results = jax.shard_map(
            gathered,
            mesh=self.mesh,
            in_specs=(row, head, row, row, P(), *[row] * len(per_token)),
            out_specs=(row, head) if per_token else row,
            check_vma=False,
        )(hidden, unembedding, targets, live, inverse, *per_token)
        if per_token:
            return results[0][:tokens], results[1][:vocab]
        return jax.tree.map(lambda x: x[:tokens], results)

    def total(self, of_hidden, of_unembedding):
        """Gradients summed over the devices that share the argument; inside `run`."""
        if self.vocab is not None:
            of_hidden = lax.psum(of_hidden, self.vocab)
        whole = tuple(n for n in self.rows if n != self.width and self.mesh.shape[n] > 1)
        # Parts of a sum keep the digits that the sum needs.
        dtype = of_unembedding.dtype
        of_unembedding = of_unembedding.astype(wide(dtype))
        if self.width is not None:
            of_unembedding = lax.psum_scatter(
                of_unembedding, self.width, scatter_dimension=1, tiled=True
            )
        if whole:
            of_unembedding = lax.psum(of_unembedding, whole)
        # XLA for TPUs (libtpu 0.0.42, 0.0.50) wants to scatter a sum over micro-batches after their
        # loop, and fails to compile where a part of the sum is converted twice on its way.
        return of_hidden, lax.optimization_barrier(of_unembedding.astype(dtype))


def _pad(x, rows: int):
    return jnp.pad(x, [(0, rows), (0, 0)]) if rows else x
