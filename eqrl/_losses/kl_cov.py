"""KL-Cov: the tokens of highest covariance are held back, so that entropy survives."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_number
from .._types import Batch, Mask, Metrics, PerToken, ScalarLike, Scores
from ._covariance import content_hash, covariance, how_many, largest
from .base import Term, term, weighted
from .ratio import log_ratio


def kl_cov(share: ScalarLike = 0.0002, *, coef: ScalarLike = 1.0) -> Term:
    r"""Unclipped surrogate, with a penalty on the few tokens that would lower the entropy most.

    $cov_t = (A_t - \bar A)(\log\pi_{old}(t) - \overline{\log\pi_{old}})$, means over the N masked
    tokens of the *rollout*. The $\max(1, \lfloor share \cdot N \rfloor)$ tokens of the highest
    covariance have the value $-A\rho + coef\,|\Delta|$, all others $-A\rho$: there is **no clip**.
    On the first update $\Delta = 0$ and the penalty has neither value nor gradient; later its
    gradient is $\pm coef\,\nabla\log\pi$, of one size however small $\Delta$ is, rounding
    included. Chosen once per rollout and kept over its epochs; among equal covariances a hash of
    what the token is decides, as in `clip_cov`.

    Differs between libraries: the paper's code and verl use the *current* policy's log-probs and
    each *micro-batch* as the population, so the choice depends on its size; verl's `coef` is 0.1 by
    default and 1 in its documentation.

    Args:
        share: part of all masked tokens that is penalised, above 0 and at most 1.
        coef: weight of the penalty, not negative.

    Returns:
        A term with metrics `loss/policy` (penalty included) and `policy/cov_frac` (chosen tokens).
        Without `rollout.old_logprobs` the sampler's log-probs give the covariance.

    Source: Cui et al. 2025 (arXiv:2505.22617).
    """
    check_number("share", share, above=0, most=1)
    check_number("coef", coef, least=0)
    return term(_kl_cov, builder=kl_cov, prepare=_prepare, share=share, coef=coef)


def _prepare(batch: Batch, *, share: ScalarLike, coef: ScalarLike) -> Mask:
    """The tokens that are penalised."""
    del coef
    mask = batch.rollout.mask
    return largest(covariance(batch), content_hash(batch, 0), mask, how_many(share, mask))


def _kl_cov(
    scores: Scores, batch: Batch, *, share: ScalarLike, coef: ScalarLike
) -> tuple[PerToken, Metrics]:
    del share
    delta, advantage, chosen = log_ratio(scores, batch), batch.advantages, batch.prepared
    # No clip bounds the ratio; where the advantage is 0 it may be anything.
    rho = jnp.exp(jnp.where(advantage == 0, jnp.zeros_like(delta), delta))
    # `jnp.abs` has slope 1 at 0, where this has none.
    size = delta * lax.stop_gradient(jnp.sign(delta))
    penalty = jnp.where(chosen, coef * size, jnp.zeros_like(delta))
    value = penalty - advantage * rho
    return value, {
        "loss/policy": weighted(value, batch),
        "policy/cov_frac": batch.mean(chosen.astype(value.dtype)),
    }
