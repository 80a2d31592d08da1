"""From hidden states to log-probs and entropy, the one door to every implementation."""

from typing import Literal, Protocol, TypeAlias, runtime_checkable

import jax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .._prompts import coarse_bucket
from .._types import ScalarLike
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
    implementation: Implementation = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    r"""Log-prob of each target token, and the entropy of the distribution it came from.

    With logits $z = h W^\top / \tau$: $\log p = z_y - \mathrm{lse}(z)$ and
    $H = \mathrm{lse}(z) - \sum_v p_v z_v$, in float32 (or float64 for float64 inputs) whatever
    the inputs' type. Both outputs are differentiable in `hidden` and `unembedding`, and in nothing
    else. With a soft cap $c$, $z = c \tanh(h W^\top / c) / \tau$ (Gemma 2, arXiv:2408.00118).

    Args:
        hidden: final hidden states; row i predicts `targets[i]`.
        unembedding: the output head, one row a vocabulary entry.
        targets: token ids.
        temperature: the sampling temperature the log-probs are taken at, above 0.
        soft_cap: of the logits before the temperature, above 0; none by default.
        mask: False where nothing is to be computed: there, both results are 0, no gradient flows,
            and hidden states may be anything. Only the other tokens go through the head if their
            number is known when the program is compiled: outside `jit`, or by `buffer`.
        buffer: room for that many tokens that are not masked; **tokens beyond it are lost**, so it
            must be at least `mask.sum()`. Every number is a program of its own: take it from few
            sizes.
        implementation: `"reference"` holds all logits `[*batch, vocab]`: the definition, and
            right for small sizes. `"chunked"` scans the vocabulary and never holds them.
            `"pallas"` is the kernel for TPU and GPU, and refuses to run elsewhere. A function of
            the protocol `LogProbs` is used as it is: `functools.partial(chunked, size=1024)`,
            `over_mesh(...)`, your own kernel. `None` chooses, see `choose`.

    Returns:
        Log-probs and entropies in nats, of `targets`' shape.

    Raises:
        ValueError: if `implementation` does not exist or cannot run here, or `soft_cap` is not
            above 0.
    """
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be above 0, or None for no cap")
    if buffer is not None and mask is None:
        raise ValueError(f"buffer={buffer} needs `mask`, which says whose tokens it holds")
    function = choose(implementation, jax.default_backend())
    if mask is not None and buffer is None and not isinstance(mask, Tracer):
        buffer = coarse_bucket(int(mask.sum()))

    def of(hidden, targets, mask):
        return function(
            hidden, unembedding, targets, temperature=temperature, soft_cap=soft_cap, mask=mask
        )

    flat = None if mask is None else mask.reshape(-1)
    logprobs, entropy = condense(
        of, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), flat, buffer
    )
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)


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
