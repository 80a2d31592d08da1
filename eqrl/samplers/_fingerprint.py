"""Whether a server took new weights: what it says after fixed prompts, reload after reload."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._prompts import Prompts
from ..models import Transformer
from .engine import EngineError


_PROBES = 8
_LONGEST = 256
# Nats. Below it, the policy's own forward may say something else by rounding alone.
_MOVED = 1e-3


def probes(prompts: Prompts) -> list[list[int]]:
    """At most eight beginnings of the longest prompt; the last is all of it, or 256 tokens."""
    positions = np.asarray(prompts.positions)
    row = int(np.argmax((positions >= 0).sum(axis=1)))
    text = np.asarray(prompts.tokens)[row][positions[row] >= 0][:_LONGEST].tolist()
    lengths = np.unique(np.linspace(1, len(text), _PROBES).round().astype(int))
    return [text[:length] for length in lengths]


def own_logprobs(policy: Transformer, texts: list[list[int]]) -> Float[Array, "probe vocab"]:
    """The policy's log-probs of every token after each of `probes`, at temperature 1.

    One short forward, which is not waited for.
    """
    last = np.array([len(text) - 1 for text in texts], np.int32)
    return _own(policy, jnp.asarray([texts[-1]], jnp.int32), jnp.asarray(last))


@eqx.filter_jit
def _own(
    policy: Transformer, tokens: Int[Array, "1 time"], last: Int[Array, " probe"]
) -> Float[Array, "probe vocab"]:
    hidden = policy(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])[0, last]
    logits = jnp.einsum("pd,vd->pv", hidden, policy.unembedding, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits.astype(jnp.float32))


@dataclasses.dataclass(eq=False)
class Fingerprints:
    """What a server said after the probes, and what the policy would have.

    Two things show that weights did not arrive, the second also after small updates:

    - the log-probs are far off the policy's own: further than those of the first policy, which
      rollouts were checked for, by more than the tolerance;
    - the answers, tokens and log-probs, are to the last digit those of before, while the policy's
      own moved. A server that took weights computes with other numbers and does not say the same
      again, unless its own precision rounds all of the update away. The policy's are compared
      with those of the time when the answers last changed, so updates add up until one of its
      log-probs has moved by 1e-3 nats, the least that counts.

    What escapes both: a server that keeps its weights and whose numbers differ from one time to
    the next, until the policy has moved as far as the tolerance.

    Attributes:
        tolerance: of the mean absolute difference of log-probs, in nats.
        who: names the server in messages.
    """

    tolerance: float
    who: str

    def __post_init__(self) -> None:
        self._usual: float | None = None
        self._before: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def check(self, own: np.ndarray, tokens: np.ndarray, theirs: np.ndarray) -> None:
        """Judges the answers of one policy.

        Args:
            own: `[probe, vocab]`, from `own_logprobs`.
            tokens: `[probe]`, the token that the server says is the likeliest.
            theirs: `[probe]`, its log-prob there; NaN where there was no answer.

        Raises:
            EngineError: if it has other weights.
        """
        said = np.isfinite(theirs)
        rows = np.arange(len(tokens))
        if tokens.max() >= own.shape[1]:
            raise EngineError(
                f"{self.who} answers token {tokens.max()} where the policy knows {own.shape[1]}; "
                "it has another model"
            )
        apart = float(np.abs(theirs - own[rows, tokens])[said].mean()) if said.any() else 0.0
        if self._usual is None:
            self._usual = apart
        if not apart <= self._usual + self.tolerance:
            raise EngineError(
                f"{self.who} answers log-probs that are {apart:.3g} nats off the policy's own "
                f"after a reload, and {self._usual:.3g} at first (tolerance={self.tolerance:g}); "
                "it has other weights than the policy: check reload="
            )
        if self._before is not None:
            old, same_tokens, same = self._before
            if (tokens == same_tokens)[said].all() and np.array_equal(theirs, same, equal_nan=True):
                moved = np.abs(own[rows, tokens] - old[rows, tokens])[said]
                if said.any() and moved.max() > _MOVED:
                    raise EngineError(
                        f"{self.who} answers after a reload what it answered before, to the last "
                        f"digit, though the policy's log-probs moved by up to {moved.max():.3g} "
                        "nats; it still has old weights: check reload="
                    )
                return
        self._before = own, tokens, theirs
