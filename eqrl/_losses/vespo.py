"""VESPO: a smooth weight of the whole completion's probability ratio."""

from typing import Any

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term
from .cispo import reweighted
from .ratio import sequence_ratio


_LIMIT = 20.0  # nats, on the log of the product


def vespo(
    positive_power: ScalarLike = 2.0,
    positive_decay: ScalarLike = 3.0,
    negative_power: ScalarLike = 3.0,
    negative_decay: ScalarLike = 2.0,
) -> Term:
    r"""Policy gradient under a smooth weight of the completion's *product* of token ratios.

    With $w = e^{\mathrm{clip}(\sum_s\Delta_s, -20, 20)}$, detached, the value of a token is
    $-\phi(w)\,A\,e^{\log\pi - \mathrm{sg}(\log\pi)}$ and its gradient $-\phi(w)\,A\,
    \nabla\log\pi$, with $\phi(w) = e^{\lambda} w^k e^{-\lambda w}$. $\phi(1) = 1$; the weight is
    largest, $e^{\lambda - k}(k/\lambda)^k$, at $w = k/\lambda$, and goes to 0 on both sides.
    The product is not divided by the length: a long completion leaves the neighbourhood of 1 early.

    Differs between libraries: TRL's value is $-\phi A\log\pi$, with the same gradient.

    Args:
        positive_power: k where the advantage is not negative; not negative itself.
        positive_decay: lambda there; not negative.
        negative_power: k where the advantage is negative; not negative.
        negative_decay: lambda there; not negative.

    Returns:
        A term with metrics `loss/policy` and `policy/weight` (token mean of the weight).

    Source: "Variational Sequence-Level Soft Policy Optimization", 2026 (VESPO, arXiv:2602.10693).
    """
    arguments: dict[str, Any] = {
        "positive_power": positive_power,
        "positive_decay": positive_decay,
        "negative_power": negative_power,
        "negative_decay": negative_decay,
    }
    for name, value in arguments.items():
        check_number(name, value, least=0)
    return term(_vespo, builder=vespo, **arguments)


def _vespo(
    scores: Scores,
    batch: Batch,
    *,
    positive_power: ScalarLike,
    positive_decay: ScalarLike,
    negative_power: ScalarLike,
    negative_decay: ScalarLike,
) -> tuple[PerToken, Metrics]:
    log_w = jnp.clip(sequence_ratio()(scores, batch), -_LIMIT, _LIMIT)
    negative = batch.advantages < 0
    power = jnp.where(negative, negative_power, positive_power).astype(log_w.dtype)
    decay = jnp.where(negative, negative_decay, positive_decay).astype(log_w.dtype)
    return reweighted(jnp.exp(power * log_w - decay * jnp.expm1(log_w)), scores, batch)
