"""Masks the tokens that drifted most, until the rest are close enough."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Mask, Metrics, PerToken, ScalarLike, Scores
from .factor import Factor, factor


def m2po(budget: ScalarLike = 0.04, *, everywhere: bool = False) -> Factor:
    r"""0 on the tokens with the largest squared log-ratio, as few as bring the mean to `budget`.

    With $d_t = \log\pi_{old}(t) - \log\pi_{sampler}(t)$, tokens leave in order of falling $d_t^2$
    until the mean of $d_t^2$ over those that remain is at most `budget`; the others give 1. Counted
    are only tokens that PPO's clip could act on, $A_t d_t > 0$ (drifted where the advantage
    pushes); the rest always give 1. `everywhere=True` counts all masked tokens. The population is
    the rollout, not a micro-batch; tokens of equal $d_t^2$ leave together. It replaces the clip;
    those that stay bear the whole ratio to the sampler: `m2po() * tis(None) * unclipped()`.

    Differs between libraries: AReaL counts all tokens, in each micro-batch anew, and divides by the
    tokens it keeps; the paper divides by all, as here. The paper takes the policy in training in
    place of the old one, which differs after the first of several updates on a rollout.

    Args:
        budget: largest mean of the squared log-ratio in nats squared, from 0.
        everywhere: whether tokens that a clip would leave alone count, and may be masked, too.

    Returns:
        A factor with metric `policy/m2po_masked_frac`; requires `rollout.old_logprobs`.

    Source: Zheng et al. 2025 (M2PO, arXiv:2510.01161), algorithm 1.
    """
    check_number("budget", budget, least=0)
    return factor(
        _read,
        builder=m2po,
        requires=("old_logprobs",),
        prepare=_m2po,
        reads_scores=False,
        budget=budget,
        everywhere=everywhere,
    )


def _m2po(batch: Batch, *, budget: ScalarLike, everywhere: bool) -> PerToken:
    rollout = batch.rollout
    drift = zero_unmasked(rollout.need("old_logprobs") - rollout.logprobs, rollout.mask)
    counted = rollout.mask
    if not everywhere:
        counted = counted & (batch.advantages * jnp.sign(drift) > 0)
    square = drift**2
    leave = counted & (square > _cutoff(square, counted, budget))
    return (rollout.mask & ~leave).astype(batch.advantages.dtype)


def _cutoff(square: PerToken, counted: Mask, budget: ScalarLike) -> Float[Array, ""]:
    """The largest square that may stay; negative if none may."""
    ordered = jnp.sort(jnp.where(counted, square, jnp.inf).ravel())
    ranks = jnp.arange(1, ordered.size + 1)
    inside = ranks <= jnp.sum(counted)
    total = jnp.cumsum(jnp.where(inside, ordered, jnp.zeros((), ordered.dtype)))
    # Equal squares stay or leave together: only at the last of them may the cut fall.
    last = jnp.append(ordered[1:] > ordered[:-1], True)
    fits = inside & last & (total <= budget * ranks.astype(total.dtype))
    return jnp.max(jnp.where(fits, ordered, -1.0), initial=-1.0)


def _read(
    scores: Scores, batch: Batch, *, budget: ScalarLike, everywhere: bool
) -> tuple[PerToken, Metrics]:
    del scores, budget, everywhere
    return batch.prepared, {"policy/m2po_masked_frac": batch.mean(1 - batch.prepared)}
