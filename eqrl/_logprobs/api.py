"""From hidden states to log-probs and entropy, the one door to every implementation."""

from typing import Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .._prompts import coarse_bucket
from .._types import ScalarLike, wide
from .chunked import chunked
from .condense import condense
from .reference import reference


@runtime_checkable
class LogProbs(Protocol):
    """What an implementation is: `token_logprobs` on a flat list of tokens."""

    def __call__(
        self,
        hidden: Float[Array, "token width"],
        unembedding: Float[Array, "vocab width"],
        targets: Int[Array, " token"],
        /,
        *,
        temperature: ScalarLike,
        soft_cap: float | None,
        mask: Bool[Array, " token"] | None,
    ) -> tuple[Float[Array, " token"], Float[Array, " token"]]: ...


Implementation: TypeAlias = Literal["reference", "chunked", "pallas"] | LogProbs | None


def token_logprobs(
    hidden: Float[Array, "*batch width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    buffer: int | None = None,
    shards: int = 1,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    r"""Log-prob of each target token, and the entropy of the distribution it came from.

    With logits $z = h W^\top / \tau$: $\log p = z_y - \mathrm{lse}(z)$ and
    $H = \mathrm{lse}(z) - \sum_v p_v z_v$, in float32 (or float64 for float64 inputs) whatever
    the inputs' type. Both outputs are differentiable in `hidden` and `unembedding`, in reverse, and
    in nothing else. With a soft cap $c$ it is $z = c \tanh(h W^\top / c) / \tau$ (Gemma 2,
    arXiv:2408.00118).

    Args:
        hidden: final hidden states; row i predicts `targets[i]`.
        unembedding: the output head, one row a vocabulary entry.
        targets: token ids; the log-prob of one outside the vocabulary is NaN.
        temperature: the sampling temperature the log-probs are taken at, above 0.
        soft_cap: of the logits before the temperature, above 0; none by default.
        mask: False where nothing is to be computed: there, both results are 0, no gradient flows,
            and hidden states and targets may be anything. Only the other tokens go through the head
            if their number is known when the program is compiled: outside `jit`, or by `buffer`.
        buffer: room for that many tokens that are not masked; **tokens beyond it are lost**, so it
            must be at least `mask.sum()`. Every number is a program of its own: take it from few
            sizes.
        shards: equal runs of tokens that fill equal parts of the buffer, each of its own: as many
            as there are devices that tokens are spread over. Divides `buffer` and the tokens.
        implementation: `"reference"` holds all logits `[*batch, vocab]`: the definition, and
            right for small sizes. `"chunked"` scans the vocabulary and holds a slice of them at a
            time, unless all are few.
            `"pallas"` is the kernel for TPU and GPU, and refuses to run elsewhere. A function of
            the protocol `LogProbs` is used as it is: `functools.partial(chunked, size=1024)`,
            `over_mesh(...)`, your own kernel. `None` chooses, see `choose`.

    Returns:
        Log-probs and entropies in nats, of `targets`' shape.

    Raises:
        ValueError: if `implementation` does not exist or cannot run here, `temperature` or
            `soft_cap` is not above 0, or `buffer` has too little room for a mask that is known.
    """
    _check(targets, temperature, soft_cap, mask, buffer, shards)
    function = choose(implementation, jax.default_backend())
    if targets.size == 0:
        nothing = jnp.zeros(targets.shape, wide(hidden.dtype))
        return nothing, nothing
    most = _most_tokens(mask, shards)
    if most is not None and buffer is None:
        buffer = shards * coarse_bucket(most)

    def of(hidden, targets, mask):
        return function(
            hidden, unembedding, targets, temperature=temperature, soft_cap=soft_cap, mask=mask
        )

    flat = None if mask is None else mask.reshape(-1)
    logprobs, entropy = condense(
        of, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), flat, buffer, shards
    )
    logprobs, entropy = logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
    # An index from elsewhere (-100 is a habit) would read the log-prob of no token.
    exists = (targets >= 0) & (targets < unembedding.shape[0])
    return jnp.where(exists if mask is None else exists | ~mask, logprobs, jnp.nan), entropy


def _check(targets, temperature, soft_cap, mask, buffer, shards) -> None:
    """Refuses what is wrong as far as it is known before numbers are."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be above 0, or None for no cap")
    if buffer is not None and mask is None:
        raise ValueError(f"buffer={buffer} needs `mask`, which says whose tokens it holds")
    if targets.size % shards or (buffer or 0) % shards:
        raise ValueError(f"shards={shards} must divide {targets.size} tokens and buffer={buffer}")
    most = _most_tokens(mask, shards)
    if buffer is not None and most is not None and most > buffer // shards:
        raise ValueError(
            f"buffer={buffer} holds {buffer // shards} tokens a shard, and {most} are not masked; "
            "give it room for all"
        )


def _most_tokens(mask, shards: int) -> int | None:
    """How many tokens of one shard are not masked, at most; `None` where that is not known."""
    if mask is None or isinstance(mask, Tracer) or not mask.is_fully_addressable:
        return None
    return int(np.asarray(mask).reshape(shards, -1).sum(axis=1).max(initial=0))


def choose(implementation: Implementation, platform: str) -> LogProbs:
    """The function behind a name; the only place where one is chosen.

    Args:
        implementation: see `token_logprobs`.
        platform: `"cpu"`, `"gpu"` or `"tpu"`.

    Raises:
        ValueError: if the name does not exist, or cannot run on this platform.
    """
    match implementation, platform:
        # On every platform: no measurement on a TPU or GPU says otherwise yet.
        case ((None | "chunked"), _):
            return chunked
        case "reference", _:
            return reference
        case "pallas", "tpu":
            from .pallas.mosaic_tpu import pallas_tpu

            return pallas_tpu
        case "pallas", "gpu":
            from .pallas.triton import pallas_triton

            return pallas_triton
        case "pallas", _:
            raise ValueError(
                f"implementation='pallas' runs on TPU and GPU, and this is {platform}; "
                "use 'chunked', which needs as little memory"
            )
        case _ if callable(implementation):
            return implementation
        case _:
            raise ValueError(
                f"implementation={implementation!r} does not exist; use 'reference', 'chunked', "
                "'pallas', a function, or None"
            )
