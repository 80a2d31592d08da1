"""The importance weight between sampler and trainer, and what its corrections report."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from .._masked import row_length, row_total, spread, zero_unmasked
from .._types import Batch, Metrics, PerToken, Scores


def log_weight(scores: Scores, batch: Batch) -> PerToken:
    """`logp_old - logp_sampler` per token, zero on unmasked positions, without gradient.

    With `rollout.old_logprobs` absent, the rollout serves a single update: the current log-probs
    stand in.
    """
    rollout = batch.rollout
    old = scores.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    return lax.stop_gradient(zero_unmasked(old - rollout.logprobs, rollout.mask))


def on_rows(x: PerToken, batch: Batch) -> PerToken:
    """The row's sum of `x` on each of its masked tokens."""
    mask = batch.rollout.mask
    return spread(row_total(x, mask), mask)


def row_means(x: PerToken, batch: Batch) -> PerToken:
    """The row's mean of `x` over its masked tokens, on each of them; 0 on empty rows."""
    mask = batch.rollout.mask
    length = jnp.maximum(row_length(mask), 1).astype(x.dtype)
    return spread(row_total(x, mask) / length, mask)


def kept(
    weight: PerToken, keep: Bool[Array, "batch time"], batch: Batch
) -> tuple[PerToken, Metrics]:
    """`weight` where `keep`, 0 elsewhere, and the metrics of a mask."""
    value = jnp.where(keep, weight, jnp.zeros((), weight.dtype))
    masked = jnp.logical_not(keep).astype(weight.dtype)
    return value, {
        "mismatch/masked_frac": batch.mean(masked),
        "mismatch/correction_mean": batch.mean(value),
    }


def bounded(weight: PerToken, bounded: PerToken, batch: Batch) -> tuple[PerToken, Metrics]:
    """The bounded weight, and the metrics of a bound."""
    moved = (weight != bounded).astype(weight.dtype)
    return bounded, {
        "mismatch/truncated_frac": batch.mean(moved),
        "mismatch/correction_mean": batch.mean(bounded),
    }
