"""A square that holds the policy near the one that sampled."""

from .._types import Batch, Metrics, PerToken, Scores
from .base import Term, term, weighted
from .ratio import log_ratio


def squared_ratio() -> Term:
    r"""Half the squared log-ratio to the policy that sampled: the k2 estimate of their divergence.

    The value of a token is $\frac12\Delta^2$ with $\Delta = \log\pi - \log\pi_{old}$, its gradient
    $\Delta\,\nabla\log\pi$. On the first update of a rollout both are 0. Scale it:
    `dppo(max_weight=None) + 2e-3 * squared_ratio()`. `kl("k2")` is the same against the frozen
    reference.

    Differs between libraries: prime-rl adds $10^{-3}\Delta^2$, without the half: `2e-3` here.

    Returns:
        A term with metric `loss/squared_ratio` (before any coefficient).

    Source: Schulman, "Approximating KL divergence", 2020; as a loss, Kimi Team 2025
    (Kimi k1.5, arXiv:2501.12599).
    """
    return term(_squared_ratio, builder=squared_ratio)


def _squared_ratio(scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
    value = 0.5 * log_ratio(scores, batch) ** 2
    return value, {"loss/squared_ratio": weighted(value, batch)}
