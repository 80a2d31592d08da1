"""Clip-Cov: a few tokens of high covariance do not train, so that entropy survives."""

import dataclasses

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Mask, Metrics, PerToken, ScalarLike, Scores
from ._covariance import content_hash, covariance, how_many, least
from .base import Term, term
from .clipped import _clipped


def clip_cov(
    share: ScalarLike = 0.0002,
    *,
    low: ScalarLike = 1.0,
    high: ScalarLike = 5.0,
    epsilon: ScalarLike = 0.2,
    seed: ScalarLike = 0,
) -> Term:
    r"""Clipped surrogate without a few random tokens that would lower the entropy most.

    $cov_t = (A_t - \bar A)(\log\pi_{old}(t) - \overline{\log\pi_{old}})$, means over the N masked
    tokens of the *rollout*. Among tokens with $low < cov < high$, $\max(1, \lfloor share \cdot N
    \rfloor)$ are chosen at random (all, if there are fewer); their value and gradient are 0. All
    others have the value of `clipped(epsilon, epsilon)`. Chosen once per rollout and kept over its
    epochs, by a hash of what the token is (its id, position, sampler's log-prob, those of its
    completion, and `seed`), not of where it stands: neither padding nor order nor micro-batches
    change the choice. Exact copies of a completion are chosen together.

    Differs between libraries: the paper's code and verl use the *current* policy's log-probs and
    each *micro-batch* as the population, so the choice depends on its size, and leave out tokens
    that the clip already holds; here candidates are judged before the first update, when the clip
    holds none.

    Args:
        share: part of all masked tokens that is chosen, above 0 and at most 1.
        low: covariance above which a token may be chosen.
        high: covariance below which it may be chosen.
        epsilon: clip range of the ratio on both sides, from 0 to 1.
        seed: another number makes another choice; not negative.

    Returns:
        A term with the metrics of `clipped` and `policy/cov_frac` (chosen tokens). Without
        `rollout.old_logprobs` the sampler's log-probs give the covariance.

    Source: Cui et al. 2025 (arXiv:2505.22617).
    """
    check_number("share", share, above=0, most=1)
    check_number("low", low)
    check_number("high", high)
    check_number("epsilon", epsilon, least=0, most=1)
    check_number("seed", seed, least=0)
    return term(
        _clip_cov,
        builder=clip_cov,
        prepare=_prepare,
        share=share,
        low=low,
        high=high,
        epsilon=epsilon,
        seed=seed,
    )


def _prepare(
    batch: Batch,
    *,
    share: ScalarLike,
    low: ScalarLike,
    high: ScalarLike,
    epsilon: ScalarLike,
    seed: ScalarLike,
) -> Mask:
    """The tokens that do not train."""
    del epsilon
    cov, mask = covariance(batch), batch.rollout.mask
    candidate = mask & (cov > low) & (cov < high)
    return least(content_hash(batch, seed), candidate, how_many(share, mask))


def _clip_cov(
    scores: Scores,
    batch: Batch,
    *,
    share: ScalarLike,
    low: ScalarLike,
    high: ScalarLike,
    epsilon: ScalarLike,
    seed: ScalarLike,
) -> tuple[PerToken, Metrics]:
    del share, low, high, seed
    chosen, old = batch.prepared, batch.rollout.old_logprobs
    # Ratio 1 and advantage 0 rather than a mask on the result: nothing overflows backwards.
    if old is not None:
        scores = dataclasses.replace(scores, logprobs=jnp.where(chosen, old, scores.logprobs))
    advantages = jnp.where(chosen, jnp.zeros_like(batch.advantages), batch.advantages)
    rest = dataclasses.replace(batch, advantages=advantages)
    value, metrics = _clipped(scores, rest, low=epsilon, high=epsilon, dual=None, ratio=None)
    return value, metrics | {"policy/cov_frac": batch.mean(chosen.astype(value.dtype))}
