"""Trains only where the policy was undecided."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_number
from .._types import Batch, Mask, Metrics, PerToken, ScalarLike, Scores
from .factor import Factor, factor


def top_entropy(share: ScalarLike = 0.2) -> Factor:
    r"""1 on the `share` of tokens with the highest entropy, 0 on the others.

    Kept is $H_t \ge q$, with $q$ the $(1 - share)$ quantile of `rollout.old_entropy` over all
    masked tokens of the rollout, linearly interpolated (`np.quantile`'s default); so ties at the
    threshold are all kept. The weights of the reduction stay, and the step shrinks
    (`normalised` restores it).

    Differs between libraries: TRL's `top_entropy_quantile=0.2` takes the quantile of the *current*
    policy's entropies over the micro-batches that run at one time on all devices; here it is that
    of the policy that sampled, over the rollout, whatever the split. Both multiply the policy term
    only, and divide by all tokens: `top_entropy() * clipped(0.2, 0.28)`.

    Args:
        share: how much to keep, above 0 to 1.

    Returns:
        A factor with metric `policy/top_entropy_frac` (share of tokens kept); requires
        `rollout.old_entropy`.

    Source: Wang et al. 2025 (arXiv:2506.01939).
    """
    check_number("share", share, above=0, most=1)
    return factor(
        _read,
        builder=top_entropy,
        requires=("old_entropy",),
        prepare=_top_entropy,
        reads_scores=False,
        share=share,
    )


def _top_entropy(batch: Batch, *, share: ScalarLike) -> PerToken:
    entropy, mask = batch.rollout.need("old_entropy"), batch.rollout.mask
    keep = mask & (entropy >= _quantile(entropy, mask, 1 - share))
    return keep.astype(batch.advantages.dtype)


def _quantile(x: PerToken, mask: Mask, level: ScalarLike) -> Float[Array, ""]:
    """The linearly interpolated quantile of masked entries; infinite when there are none."""
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf).ravel())
    last = jnp.maximum(jnp.sum(mask) - 1, 0)
    place = level * last.astype(x.dtype)
    # A place that is an integer but for rounding must not drop the token that stands there.
    whole = jnp.round(place)
    slack = 4 * jnp.finfo(x.dtype).eps * jnp.maximum(whole, 1)
    place = jnp.where(jnp.abs(place - whole) <= slack, whole, place)
    below = jnp.clip(jnp.floor(place).astype(last.dtype), 0, last)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    part = place - below.astype(x.dtype)
    return jnp.where(part > 0, low + part * (high - low), low)


def _read(scores: Scores, batch: Batch, *, share: ScalarLike) -> tuple[PerToken, Metrics]:
    del scores, share
    return batch.prepared, {"policy/top_entropy_frac": batch.mean(batch.prepared)}
