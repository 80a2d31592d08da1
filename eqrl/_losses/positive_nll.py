"""Imitation of completions that went well."""

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted


def positive_nll(threshold: ScalarLike = 0.0) -> Term:
    r"""Negative log-likelihood of the tokens with a high advantage; added to a surrogate.

    The value of a token is $-\log\pi$ where $A >$ `threshold`, else 0; its gradient there is
    $-\nabla\log\pi$, whatever the size of the advantage. VAPO is `clipped() + 0.1 * positive_nll()`
    and more.

    Differs between libraries: VAPO takes the completions with a correct answer and divides by
    *their* number of tokens; here the advantage decides, and the weights are the algorithm's, so
    the term is the smaller the fewer tokens qualify. NeMo's is VAPO's.

    Args:
        threshold: tokens with an advantage above it are imitated.

    Returns:
        A term with metrics `loss/positive_nll` (before any coefficient) and `policy/positive_frac`
        (tokens it applies to).

    Source: Yue et al. 2025 (VAPO, arXiv:2504.05118).
    """
    check_number("threshold", threshold)
    return term(_positive_nll, builder=positive_nll, threshold=threshold)


def _positive_nll(
    scores: Scores, batch: Batch, *, threshold: ScalarLike
) -> tuple[PerToken, Metrics]:
    chosen = (batch.advantages > threshold) & batch.rollout.mask
    value = -zero_unmasked(scores.logprobs, chosen)
    metrics = {
        "loss/positive_nll": weighted(value, batch),
        "policy/positive_frac": batch.mean(chosen.astype(value.dtype)),
    }
    return value, metrics
