"""A reward for staying undecided."""

from .._types import Batch, Metrics, PerToken, Scores
from .base import Term, term, weighted


def entropy_bonus() -> Term:
    """Minus the entropy of each token's distribution, in nats; scale it: `0.01 * entropy_bonus()`.

    Returns:
        A term with metric `loss/entropy` (before any coefficient; negative).

    Source: Mnih et al. 2016 (arXiv:1602.01783).
    """
    return term(_entropy_bonus, builder=entropy_bonus)


def _entropy_bonus(scores: Scores, batch: Batch) -> tuple[PerToken, Metrics]:
    value = -scores.entropy
    return value, {"loss/entropy": weighted(value, batch)}
