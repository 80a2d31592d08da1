"""What a sampler is, and the contract every backend meets."""

from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer


class Sampling(eqx.Module):
    """What to sample of each prompt.

    There is no top-k and no top-p: the log-probs that train are those of the whole distribution,
    and so must be the samples.

    Attributes:
        samples: completions a prompt.
        max_tokens: completion tokens at most, the stop token included.
        stop_ids: tokens that end a completion; any of them, also as the first token.
        temperature: divides the logits; 0 takes the most likely token, and log-probs are then
            those at temperature 1.

    Raises:
        ValueError: if a number is out of its range.
    """

    samples: int = eqx.field(static=True)
    max_tokens: int = eqx.field(static=True)
    stop_ids: tuple[int, ...] = eqx.field(static=True)
    temperature: float | int = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above")


@runtime_checkable
class Sampler(Protocol):
    """`(policy, prompts, sampling, *, key) -> rollout`: what this policy says to these prompts.

    The contract, tested against every backend: token ids are exactly those that were sampled, the
    stop token included and masked True; a row's log-probs are the policy's own at the sampling
    temperature, for each masked token, also after the policy has changed; row `p * samples + s` is
    sample s of prompt p, and its group is `p * samples`; the same key gives the same rollout; what
    a prompt yields does not depend on the other prompts.
    """

    def __call__(
        self, policy: Transformer, prompts: Prompts, sampling: Sampling, *, key: PRNGKeyArray
    ) -> Rollout:
        """Samples completions of every prompt."""
        ...
