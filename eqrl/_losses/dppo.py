"""DPPO: tokens whose probability moved too far are dropped, by divergence instead of ratio."""

import jax.numpy as jnp

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term
from .cispo import reweighted


def dppo(
    low: ScalarLike = 0.2,
    high: ScalarLike = 0.2,
    *,
    max_weight: ScalarLike | None = 20.0,
    divergence: str = "tv",
) -> Term:
    r"""Policy gradient on tokens whose own probability is still close to the old one.

    A token is dropped if it already moved the way its advantage pushes it, and too far: where
    $A > 0$, if $\pi > \pi_{old}$ by more than `high`; else, if $\pi < \pi_{old}$ by more than
    `low`. "By more" means $|\pi - \pi_{old}|$ with `"tv"`; with `"kl"` it means
    $KL(\pi_{old} \| \pi)$ of "this token or another", in nats. Here $\pi_{old} =
    e^{\log\pi_{old}}$ is a probability, not a ratio: a token of probability 1e-4 may grow
    two-thousandfold. Dropped tokens have value and gradient 0; kept ones the value
    $-A\,\mathrm{sg}(\min(\rho, m))\,e^{\log\pi - \mathrm{sg}(\log\pi)}$.

    Differs between libraries: verl truncates the weight at 20 in code; prime-rl's default loss does
    not (`max_weight=None`), takes the sampler's log-probs as the old ones and adds
    $10^{-3}(\log\rho)^2$, which is `2e-3 * squared_ratio()`.

    Args:
        low: largest decrease that still trains: of probability, or in nats with `"kl"`.
        high: largest increase that still trains, likewise. Neither is negative.
        max_weight: the largest importance weight $m$, above 0; `None` for no bound.
        divergence: `"tv"` or `"kl"`.

    Returns:
        A term with metrics `loss/policy`, `policy/weight` (token mean of the weight, 0 on dropped
        tokens) and `policy/masked_frac` (dropped tokens; those of advantage 0 are judged by `low`).

    Source: Qi et al. 2026 (DPPO, arXiv:2602.04879).
    """
    check_number("low", low, least=0)
    check_number("high", high, least=0)
    if max_weight is not None:
        check_number("max_weight", max_weight, above=0)
    check_choice("divergence", divergence, ("tv", "kl"))
    return term(
        _dppo, builder=dppo, low=low, high=high, max_weight=max_weight, divergence=divergence
    )


def _dppo(
    scores: Scores,
    batch: Batch,
    *,
    low: ScalarLike,
    high: ScalarLike,
    max_weight: ScalarLike | None,
    divergence: str,
) -> tuple[PerToken, Metrics]:
    mask, old = batch.rollout.mask, batch.rollout.old_logprobs
    new = zero_unmasked(scores.logprobs, mask)
    old = new if old is None else zero_unmasked(old, mask)
    moved = jnp.exp(new) - jnp.exp(old)
    distance = jnp.abs(moved) if divergence == "tv" else _binary_kl(old, new)
    too_high = (batch.advantages > 0) & (moved > 0) & (distance > high)
    too_low = (batch.advantages <= 0) & (moved < 0) & (distance > low)
    dropped = too_high | too_low
    rho = jnp.exp(jnp.where(dropped, jnp.zeros_like(new), new - old))
    weight = rho if max_weight is None else jnp.minimum(rho, max_weight)
    value, metrics = reweighted(jnp.where(dropped, jnp.zeros_like(rho), weight), scores, batch)
    return value, metrics | {"policy/masked_frac": batch.mean(dropped.astype(rho.dtype))}


def _binary_kl(p: PerToken, q: PerToken) -> PerToken:
    """KL divergence between "this token or another" under two log-probs of the token."""
    # A probability of 1 leaves 0 for the others, whose logarithm must stay finite.
    tiny = jnp.finfo(p.dtype).tiny
    others = lambda x: -jnp.expm1(jnp.minimum(x, -tiny))  # noqa: E731
    rest = others(p) * (jnp.log(others(p)) - jnp.log(others(q)))
    return jnp.exp(p) * (p - q) + rest
