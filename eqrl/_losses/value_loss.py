"""The critic's regression, clipped around its predictions at sampling time."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted


def value_loss(clip: ScalarLike | None = 0.2, *, huber: ScalarLike | None = None) -> Term:
    r"""Squared error to the value target, optionally clipped.

    $\tfrac12\max((V-G)^2, (\mathrm{clip}(V, V_{old}-c, V_{old}+c)-G)^2)$, with $G$ =
    `batch.targets` and $V_{old}$ = `rollout.values`; with `clip=None` simply
    $\tfrac12(V-G)^2$. With `huber` (h), $\tfrac12e^2$ becomes $h(|e| - \tfrac12h)$ for errors
    $|e| > h$: the same for small errors, a bounded gradient for large ones. Masked positions
    give 0.

    Differs between libraries: `clip` is 0.2 in TRL, 0.5 in verl, OpenRLHF and AReaL; slime and the
    predecessor leave the half out (`2.0 * value_loss()`); AReaL offers `huber=10`.

    Args:
        clip: how far the prediction may move in one rollout, above 0; `None` for no bound.
        huber: the error beyond which the loss is linear, above 0; `None` for squares everywhere.

    Returns:
        A term with metrics `loss/value` and `value/clip_frac` (tokens whose clipped error is the
        larger one); requires `rollout.values` and an algorithm with a `target`.

    Source: Schulman et al. 2017 (arXiv:1707.06347), the reference implementation.
    """
    if clip is not None:
        check_number("clip", clip, above=0)
    if huber is not None:
        check_number("huber", huber, above=0)
    return term(_value_loss, builder=value_loss, requires=("values",), clip=clip, huber=huber)


def _half_square(error: PerToken, huber: ScalarLike | None) -> PerToken:
    """Half the squared error, linear beyond `huber`."""
    if huber is None:
        return 0.5 * error**2
    size = jnp.minimum(jnp.abs(error), huber)
    return size * (jnp.abs(error) - 0.5 * size)


def _value_loss(
    scores: Scores, batch: Batch, *, clip: ScalarLike | None, huber: ScalarLike | None
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
    value = _half_square(predicted - target, huber)
    moved = jnp.zeros_like(value)
    if clip is not None:
        old = zero_unmasked(batch.rollout.need("values"), mask)
        bounded = _half_square(jnp.clip(predicted, old - clip, old + clip) - target, huber)
        moved = (bounded > value).astype(value.dtype)
        value = jnp.maximum(value, bounded)
    return value, {"loss/value": weighted(value, batch), "value/clip_frac": batch.mean(moved)}
