"""DRO: a policy gradient held back by a square instead of a clip."""

from .._checks import check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from .base import Term, term, weighted
from .ratio import log_ratio


def dro(beta: ScalarLike) -> Term:
    r"""Direct reward optimisation's policy loss, for data of any policy.

    The value of a token is $-(A\log\pi - \frac\beta2\Delta^2)$ with $\Delta = \log\pi -
    \log\pi_{old}$; its gradient is $(\beta\Delta - A)\,\nabla\log\pi$. No importance weight: the
    step shrinks as the log-ratio nears $A/\beta$, and turns back beyond. The value holds
    $A\log\pi$, so `loss/policy` is of no use for reading progress.

    Differs between libraries: verl's is this one. The paper's baseline is a learned value function
    and its square is against a reference policy.

    Args:
        beta: strength of the square, not negative; per nat.

    Returns:
        A term with metrics `loss/policy` and `policy/squared_ratio` (token mean of
        $\frac12\Delta^2$ in nats).

    Source: Richemond et al. 2024 (DRO, arXiv:2405.19107).
    """
    check_number("beta", beta, least=0)
    return term(_dro, builder=dro, beta=beta)


def _dro(scores: Scores, batch: Batch, *, beta: ScalarLike) -> tuple[PerToken, Metrics]:
    logprobs = zero_unmasked(scores.logprobs, batch.rollout.mask)
    square = 0.5 * log_ratio(scores, batch) ** 2
    value = beta * square - batch.advantages * logprobs
    metrics = {"loss/policy": weighted(value, batch), "policy/squared_ratio": batch.mean(square)}
    return value, metrics
