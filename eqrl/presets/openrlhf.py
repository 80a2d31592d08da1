"""What OpenRLHF computes with its defaults.

Its order: score, baseline, *then* a clip to 10, then k1 clamped at 10 nats with 0.01 per token,
then the sum over later tokens, then (for some) whitening with n and a clamped variance. So a token
bears the KL of the tokens after it, after the baseline.
"""

from .. import _advantages as signals, _losses as losses
from .._transform import AbstractTransform
from ..algorithms import Algorithm


def _summed(kl: float, gamma: float = 1.0) -> AbstractTransform:
    """Reward clip, KL and return, from a score on."""
    later = signals.returns(gamma, gap="decay")
    cost = signals.kl_penalty(kl, limit=10.0) | later if kl else later
    return signals.clip(10.0) | cost


def _baselined(baseline: AbstractTransform, kl: float) -> AbstractTransform:
    return baseline | signals.as_score() | _summed(kl)


def _whitened() -> AbstractTransform:
    return signals.whiten(ddof=0, stabiliser="clamp")


def _token_ratio(advantage: AbstractTransform) -> Algorithm:
    return Algorithm(advantage, losses.clipped(), losses.token_mean())


def reinforce_pp(kl: float = 0.01, gamma: float = 1.0) -> Algorithm:
    """`advantage_estimator=reinforce`: the paper's, clamped, the discount applied across gaps.

    Args:
        kl: coefficient of the per-token KL.
        gamma: discount per token.
    """
    return _token_ratio(_summed(kl, gamma) | _whitened())


def reinforce_pp_baseline(kl: float = 0.01) -> Algorithm:
    """`reinforce_baseline`: a token bears the KL of later tokens too.

    Args:
        kl: coefficient of the per-token KL.
    """
    return _token_ratio(_baselined(signals.group_center(), kl) | _whitened())


def rloo(kl: float = 0.01) -> Algorithm:
    """`rloo`: KL after the baseline, clipped token ratio, token mean.

    Args:
        kl: coefficient of the per-token KL.
    """
    return _token_ratio(_baselined(signals.rloo(), kl))


def grpo(kl: float = 0.01) -> Algorithm:
    """`group_norm`: deviation + 1e-9, KL in the advantage in place of the loss, token mean.

    Args:
        kl: coefficient of the per-token KL.
    """
    return _token_ratio(_baselined(signals.group_norm(eps=1e-9), kl))


def dr_grpo(kl: float = 0.01) -> Algorithm:
    """`dr_grpo`: only the half of it that leaves out the deviation; the loss is a token mean.

    Args:
        kl: coefficient of the per-token KL.
    """
    return _token_ratio(_baselined(signals.group_center(), kl))


def ppo(kl: float = 0.01, gamma: float = 1.0, lam: float = 1.0) -> Algorithm:
    """`gae`: a gap in the mask counts as value 0 and decays; value clip 0.5.

    Args:
        kl: coefficient of the per-token KL.
        gamma: discount per token.
        lam: GAE's trade-off.
    """
    estimate = signals.gae(gamma, lam, gap="decay")
    if kl:
        estimate = signals.kl_penalty(kl, limit=10.0) | estimate
    estimate = signals.clip(10.0) | estimate
    return Algorithm(
        advantage=estimate | _whitened(),
        objective=losses.clipped() + 1.0 * losses.value_loss(0.5),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
