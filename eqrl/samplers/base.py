"""What a sampler is, and the contract every backend meets."""

from typing import Protocol

from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer


class Sampler(Protocol):
    """`(policy, prompts, *, key) -> rollout`.

    The contract, tested against every backend: token ids are exactly those that were sampled, the
    stop token included and masked True; a row's log-probs are the policy's own at the sampling
    temperature, for each masked token; rows of one prompt are neighbours and share a group id; the
    same key gives the same rollout; what a prompt yields does not depend on the other prompts.
    """

    def __call__(self, policy: Transformer, prompts: Prompts, *, key: PRNGKeyArray) -> Rollout:
        """Samples completions of every prompt."""
        ...
