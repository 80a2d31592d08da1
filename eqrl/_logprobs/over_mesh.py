"""Log-probs with tokens and vocabulary spread over devices."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from .api import Implementation, LogProbs, choose
from .layout import Layout
from .reference import reference


@functools.cache
def over_mesh(
    mesh: Mesh,
    *,
    rows: tuple[str, ...] = ("data", "fsdp"),
    vocab: str | None = "tensor",
    width: str | None = "fsdp",
    implementation: Implementation = None,
) -> LogProbs:
    """An implementation of `token_logprobs` for arrays that lie on a mesh.

    Each device computes the statistics of its tokens over its part of the vocabulary. What crosses
    devices is four numbers a token for the softmax, the width of a device's own vocabulary entries,
    and in the backward pass the sums of both gradients, in float32. Numbers of tokens and entries
    that do not divide are padded. Equal arguments give the same function, so programs that were
    compiled for it are found again.

    Args:
        mesh: the devices.
        rows: axes that tokens are spread over.
        vocab: axis that the vocabulary is spread over, or `None`.
        width: axis that the unembedding's width is spread over (one of `rows`), or `None`.
        implementation: `"chunked"` or `"pallas"`, or a function that takes `layout=`.

    Returns:
        To be passed as `implementation=`.

    Raises:
        ValueError: if an axis does not exist, or `implementation` is `"reference"`, which XLA
            partitions by itself.
    """
    function: Any = choose(implementation, jax.default_backend())
    if function is reference:
        raise ValueError(
            "implementation='reference' is partitioned by XLA itself; pass it without a mesh"
        )
    return functools.partial(function, layout=Layout(mesh, rows, vocab, width))
