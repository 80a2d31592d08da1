"""From hidden states to log-probs and entropy, the one door to every implementation."""

from collections.abc import Callable
from typing import Literal, TypeAlias

from jaxtyping import Array, Float, Int

from .._types import ScalarLike
from .chunked import chunked
from .reference import reference


Implementation: TypeAlias = Literal["reference", "chunked"] | Callable | None
Flat: TypeAlias = Float[Array, " token"]


def token_logprobs(
    hidden: Float[Array, "*batch width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch"],
    *,
    temperature: ScalarLike = 1.0,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    r"""Log-prob of each target token, and the entropy of the distribution it came from.

    With logits $z = h W^\top / \tau$: $\log p = z_y - \mathrm{lse}(z)$ and
    $H = \mathrm{lse}(z) - \sum_v p_v z_v$, in float32 (or float64 for float64 inputs) whatever
    the inputs' type. Both outputs are differentiable in `hidden` and `unembedding`.

    Args:
        hidden: final hidden states; row i predicts `targets[i]`.
        unembedding: the output head, one row a vocabulary entry.
        targets: token ids.
        temperature: the sampling temperature the log-probs are taken at, above 0.
        implementation: `"reference"` holds all logits `[*batch, vocab]`: the definition, and
            right for small sizes. `"chunked"` scans the vocabulary and never holds them. A
            function `(hidden[token width], unembedding, targets[token], temperature)` is used as
            it is. `None` chooses `"chunked"` on every platform.

    Returns:
        Log-probs and entropies in nats, of `targets`' shape.

    Raises:
        ValueError: if `implementation` is a name that does not exist.
    """
    match implementation:
        case None | "chunked":
            function = chunked
        case "reference":
            function = reference
        case _ if callable(implementation):
            function = implementation
        case _:
            raise ValueError(
                f"implementation={implementation!r} does not exist; use 'reference', 'chunked', "
                "a function, or None"
            )
    shape = targets.shape
    logprobs, entropy = function(
        hidden.reshape(-1, hidden.shape[-1]), unembedding, targets.reshape(-1), temperature
    )
    return logprobs.reshape(shape), entropy.reshape(shape)
