"""Drops tokens on which sampler and trainer disagree."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import kept, log_weight
from .factor import Factor, factor


_EDGE = 1e-6  # probabilities stay this far from 0 and 1, in float32 too


def binary_kl_mask(threshold: ScalarLike = 2.0) -> Factor:
    r"""1 on tokens whose binary divergence between sampler and trainer is small, 0 on the others.

    With $p = \pi_{old}(t)$ and $q = \pi_{sampler}(t)$, the chosen token against all others:
    $D(p\|q) = p\log\frac pq + (1-p)\log\frac{1-p}{1-q}$. A token is kept if both $D(p\|q)$ and
    $D(q\|p)$ are at most `threshold`. Probabilities are clamped to $[10^{-6}, 1 - 10^{-6}]$. In
    terms of the ratio the band is wide for rare tokens and tight for likely ones. A mask only:
    `tis() * binary_kl_mask()` weighs too.

    Differs between libraries: AReaL's "KPop" has 2.0, and multiplies kept tokens by $w_t$;
    prime-rl and the authors have 0.1.

    Args:
        threshold: largest kept divergence in nats, from 0.

    Returns:
        A factor with metrics `mismatch/masked_frac` and `mismatch/correction_mean`.

    Source: Guo et al. 2026 (KPop, ringtech.notion.site/kpop).
    """
    check_number("threshold", threshold, least=0)
    return factor(_binary_kl_mask, builder=binary_kl_mask, threshold=threshold)


def _binary_kl_mask(
    scores: Scores, batch: Batch, *, threshold: ScalarLike
) -> tuple[PerToken, Metrics]:
    sampler = zero_unmasked(batch.rollout.logprobs, batch.rollout.mask)
    p = jnp.clip(jnp.exp(log_weight(scores, batch) + sampler), _EDGE, 1 - _EDGE)
    q = jnp.clip(jnp.exp(sampler), _EDGE, 1 - _EDGE)
    first, second = jnp.log(p) - jnp.log(q), jnp.log1p(-p) - jnp.log1p(-q)
    forward = p * first + (1 - p) * second
    backward = -q * first - (1 - q) * second
    keep = (forward <= threshold) & (backward <= threshold)
    return kept(jnp.ones_like(p), keep, batch)
