"""What the system that inspired eqrl computes under its six names.

All of them: deviation with n, 1e-4 beside it, ratio clipped to [0.8, 1.3], token mean over the
global batch, no KL. Whitening is meant for the global batch; there it ran per process.
"""

from .. import _advantages as signals, _losses as losses
from .._transform import AbstractTransform
from ..algorithms import Algorithm


def _clipped(advantage: AbstractTransform) -> Algorithm:
    return Algorithm(advantage, losses.clipped(0.2, 0.3), losses.token_mean())


def _standardised() -> AbstractTransform:
    return signals.batch_norm(ddof=0, eps=1e-4)


def grpo() -> Algorithm:
    """`grpo`: deviation with n in place of n - 1."""
    return _clipped(signals.group_norm(ddof=0, eps=1e-4))


def reinforce() -> Algorithm:
    """`reinforce`: scores standardised over the batch, and a clip."""
    return _clipped(_standardised())


def rloo() -> Algorithm:
    """`rloo`: the paper's advantage, then standardised over the batch's completions."""
    return _clipped(signals.rloo() | signals.as_score() | _standardised())


def reinforce_pp() -> Algorithm:
    """`reinforce++`: the same as its `rloo`; not the published algorithm."""
    return rloo()


def dapo(alpha: float = 0.2) -> Algorithm:
    """`dapo`: `grpo` plus `alpha` times `reinforce`; no dynamic sampling, no length penalty.

    A constant group gets an advantage other than 0.

    Args:
        alpha: weight of the batch's standardised scores.
    """
    group = signals.group_norm(ddof=0, eps=1e-4)
    return _clipped(group + alpha * _standardised())


def ppo() -> Algorithm:
    """`ppo`: no KL, and no factor 1/2 in the value loss (0.5 times it, twice the half).

    A gap in the mask ends an episode there; here the recursion carries over it.
    """
    estimate = signals.gae(1.0, 0.95)
    return Algorithm(
        advantage=estimate | signals.whiten(ddof=0, eps=1e-4, stabiliser="outside"),
        objective=losses.clipped(0.2, 0.3) + 1.0 * losses.value_loss(0.2),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
