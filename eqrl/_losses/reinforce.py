"""The score-function gradient, without ratio or clip."""

import jax.numpy as jnp
from jax import lax

from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, Scores
from .base import Term, term, weighted


def reinforce() -> Term:
    r"""Policy gradient of the current policy, whatever policy sampled.

    The value of a token is $-A\,e^{\log\pi - \mathrm{sg}(\log\pi)}$: it *equals* $-A$ and its
    gradient is $-A\,\nabla\log\pi$. So the logged `loss/policy` is the weighted sum of negated
    advantages, close to 0 after a baseline; it says nothing about learning, the gradient does.
    `rollout.old_logprobs` is not read: after more than one update on a rollout the gradient is
    biased, and `clipped` is the remedy.

    Returns:
        A term with metric `loss/policy`.

    Source: Williams 1992.
    """
    return term(_reinforce, builder=reinforce)


def _reinforce(scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
    logprobs = zero_unmasked(scores.logprobs, batch.rollout.mask)
    value = -batch.advantages * jnp.exp(logprobs - lax.stop_gradient(logprobs))
    return value, {"loss/policy": weighted(value, batch)}
