"""The log-ratio between the policy in training and the policy that sampled."""

from jax import lax

from .._masked import zero_unmasked
from .._types import Batch, PerToken, Scores


def log_ratio(scores: Scores, batch: Batch) -> PerToken:
    """`logp - logp_old` per token, zero on unmasked positions.

    With `rollout.old_logprobs` absent, the rollout serves a single update: the old log-probs are
    the current ones with the gradient stopped, the ratio is 1 and its gradient is `grad logp`.
    """
    old = batch.rollout.old_logprobs
    old = lax.stop_gradient(scores.logprobs) if old is None else old
    return zero_unmasked(scores.logprobs - old, batch.rollout.mask)
