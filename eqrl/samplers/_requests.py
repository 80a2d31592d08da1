"""Between eqrl's arrays and what engines speak of: one request a completion."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from .base import Sampling
from .engine import EngineError


class Completion(NamedTuple):
    """One sampled sequence.

    Attributes:
        tokens: ids, the stop token included.
        logprobs: of each.
        stopped: whether the last token is a stop token.
        version: of the policy that sampled it.
    """

    tokens: Sequence[int] | np.ndarray
    logprobs: Sequence[float] | np.ndarray
    stopped: bool
    version: int = 0


def seeds(prompts: Prompts, sampling: Sampling, key: PRNGKeyArray) -> np.ndarray:
    """A number in `[0, 2**31)` for each completion, from the key, its prompt's id and its index."""
    return np.asarray(_seeds(key, prompts.ids, sampling.samples))


@jax.jit(static_argnums=2)
def _seeds(key, ids, samples: int):
    of_prompt = jax.vmap(jr.fold_in, (None, 0))(key, ids)
    of_row = jax.vmap(jax.vmap(jr.fold_in, (None, 0)), (0, None))(of_prompt, jnp.arange(samples))
    return jax.vmap(lambda k: jr.randint(k, (), 0, jnp.iinfo(jnp.int32).max))(of_row.reshape(-1))


def to_rollout(prompts: Prompts, sampling: Sampling, completions: Sequence[Completion]) -> Rollout:
    """Completions, `samples` a prompt and in their order, as a rollout in the decoder's layout.

    Raises:
        EngineError: if a completion breaks the contract: no token, more than were asked for, or
            another number of log-probs than of tokens.
    """
    rows, slots = len(completions), sampling.max_tokens
    tokens, logprobs = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), np.float32)
    mask = np.zeros((rows, slots), bool)
    for row, completion in enumerate(completions):
        count = len(completion.tokens)
        if not 0 < count <= slots or len(completion.logprobs) != count:
            raise EngineError(
                f"the engine answered {count} tokens and {len(completion.logprobs)} log-probs "
                f"where 1 to {slots} of each were asked for"
            )
        tokens[row, :count] = completion.tokens
        logprobs[row, :count] = completion.logprobs
        mask[row, :count] = True
    before = np.repeat(np.asarray(prompts.positions), sampling.samples, axis=0)
    positions = (before >= 0).sum(axis=1)[:, None] + np.arange(slots, dtype=np.int32)
    beside = lambda left, right: jnp.asarray(np.concatenate([left, right], axis=1))  # noqa: E731
    nothing = np.zeros(before.shape)
    return Rollout(
        tokens=beside(np.repeat(np.asarray(prompts.tokens), sampling.samples, axis=0), tokens),
        mask=beside(nothing.astype(bool), mask),
        positions=beside(before, np.where(mask, positions, -1).astype(np.int32)),
        logprobs=beside(nothing.astype(np.float32), logprobs),
        group=jnp.repeat(jnp.arange(rows, step=sampling.samples), sampling.samples),
        truncated=jnp.asarray(np.array([not x.stopped for x in completions])),
        version=jnp.asarray(np.array([x.version for x in completions], np.int32)),
    )
