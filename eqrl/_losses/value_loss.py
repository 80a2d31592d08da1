"""The critic's regression, clipped around its predictions at sampling time."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted


def value_loss(clip: ScalarLike | None = 0.2) -> Term:
    r"""Squared error to the value target, optionally clipped.

    $\tfrac12\max((V-G)^2, (\mathrm{clip}(V, V_{old}-c, V_{old}+c)-G)^2)$, with $G$ =
    `batch.targets` and $V_{old}$ = `rollout.values`; with `clip=None` simply
    $\tfrac12(V-G)^2$. Masked positions give 0.

    Differs between libraries: `clip` is 0.2 in TRL, 0.5 in verl and OpenRLHF; slime and the
    predecessor leave the half out.

    Args:
        clip: how far the prediction may move in one rollout, above 0; `None` for no bound.

    Returns:
        A term with metrics `loss/value` and `value/clip_frac` (tokens whose clipped error is the
        larger one); requires `rollout.values` and an algorithm with a `target`.

    Source: Schulman et al. 2017 (arXiv:1707.06347), the reference implementation.
    """
    if clip is not None:
        check_number("clip", clip, above=0)
    return term(_value_loss, builder=value_loss, requires=("values",), clip=clip)


def _value_loss(
    scores: Scores, batch: Batch, *, clip: ScalarLike | None
) -> tuple[PerToken, Metrics]:
    if scores.values is None:
        raise ValueError("`value_loss` reads `scores.values`, which is None; train a critic")
    if batch.targets is None:
        raise ValueError(
            "`value_loss` reads `batch.targets`, which is None; give the algorithm a `target`, "
            "such as `gae() | add_values()`"
        )
    mask = batch.rollout.mask
    predicted, target = zero_unmasked(scores.values, mask), zero_unmasked(batch.targets, mask)
    worst = (predicted - target) ** 2
    moved = jnp.zeros_like(worst)
    if clip is not None:
        old = zero_unmasked(batch.rollout.need("values"), mask)
        bounded = (jnp.clip(predicted, old - clip, old + clip) - target) ** 2
        moved = (bounded > worst).astype(worst.dtype)
        worst = jnp.maximum(worst, bounded)
    value = 0.5 * worst
    return value, {"loss/value": weighted(value, batch), "value/clip_frac": batch.mean(moved)}
