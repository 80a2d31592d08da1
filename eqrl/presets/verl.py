"""What verl computes with its defaults: no KL, token mean, and under its "vanilla" policy loss a
dual clip of 3.

verl clamps log-ratios at 20 nats (GSPO's at 10) before the exponential. No training run that
survives comes there, and nothing is clamped here.
"""

from .. import _advantages as signals, _losses as losses
from .._select import drop_constant_groups
from .._transform import AbstractTransform
from ..algorithms import Algorithm


def _vanilla(advantage: AbstractTransform, low: float = 0.2, high: float = 0.2) -> Algorithm:
    """The "vanilla" policy loss under the default aggregation."""
    return Algorithm(advantage, losses.clipped(low, high, dual=3.0), losses.token_mean())


def grpo() -> Algorithm:
    """`adv_estimator=grpo`: the paper's advantage; no KL, dual clip, token mean."""
    return _vanilla(signals.group_norm())


def dr_grpo(max_tokens: int) -> Algorithm:
    """`norm_adv_by_std_in_grpo=False` with `seq-mean-token-sum-norm` and an explicit factor.

    Without `loss_scale_factor` verl divides by the padded width of each micro-batch instead.

    Args:
        max_tokens: verl's `loss_scale_factor`.
    """
    weighting = losses.constant_length(max_tokens)
    return Algorithm(signals.group_center(), losses.clipped(dual=3.0), weighting)


def dapo(max_tokens: int, buffer: int, factor: float = 1.0) -> Algorithm:
    """The DAPO recipe: the length penalty has no cap, the dual clip is 10.

    Args:
        max_tokens: completion limit in tokens.
        buffer: width of the penalty's ramp in tokens.
        factor: the penalty at the limit.
    """
    shaped = signals.overlong(max_tokens, buffer, penalty=factor, capped=False)
    objective = losses.clipped(0.2, 0.28, dual=10.0)
    return Algorithm(
        shaped | signals.group_norm(), objective, losses.token_mean(), drop_constant_groups()
    )


def rloo() -> Algorithm:
    """`adv_estimator=rloo`: the paper's advantage under a clipped token ratio and token mean."""
    return _vanilla(signals.rloo())


def reinforce_pp(gamma: float = 1.0) -> Algorithm:
    """`adv_estimator=reinforce_plus_plus`: the paper's without its KL.

    Args:
        gamma: discount per token, not applied across gaps.
    """
    return _vanilla(signals.returns(gamma) | signals.whiten())


def reinforce_pp_baseline() -> Algorithm:
    """`adv_estimator=reinforce_plus_plus_baseline`: the paper's without its KL."""
    return _vanilla(signals.group_center() | signals.whiten())


def remax() -> Algorithm:
    """`adv_estimator=remax`: the paper's advantage under a clipped token ratio and token mean."""
    return _vanilla(signals.remax())


def opo() -> Algorithm:
    """`adv_estimator=opo`: the paper's advantage under a clipped token ratio and token mean."""
    return _vanilla(signals.opo())


def grpo_passk(samples: int) -> Algorithm:
    """`adv_estimator=grpo_passk`: only the best of a group learns, over the group's deviation.

    Args:
        samples: completions per prompt.
    """
    return _vanilla(signals.pass_at_k(samples, eps=1e-6))


def gpg() -> Algorithm:
    """`adv_estimator=gpg` with `loss_mode=gpg`: as published, token mean."""
    return Algorithm(signals.gpg(), losses.reinforce(), losses.token_mean())


def gdpo(*weights: float) -> Algorithm:
    """`adv_estimator=gdpo`: the last standardisation is over tokens, long completions weigh more.

    Args:
        *weights: one a reward component.
    """
    return _vanilla(signals.gdpo(*weights) | signals.returns() | signals.whiten())


def gspo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """`loss_mode=gspo`: the token form; the aggregation is fixed to the mean over completions.

    Its clip range is the general one, hundreds of times the paper's (3e-4, 4e-4), unless set.

    Args:
        low: how far the sequence ratio may fall and still be rewarded.
        high: how far it may rise.
    """
    objective = losses.clipped(low, high, ratio=losses.geometric_token_ratio())
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def geo_mean() -> Algorithm:
    """`loss_mode=geo_mean`: GMPO with its general clip range 0.2 as log bound, all rows counted."""
    weighting = losses.sequence_mean(count_empty=True)
    return Algorithm(signals.group_norm(), losses.gmpo(0.2, 0.2), weighting)


def cispo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """`loss_mode=cispo`: the weight is clipped to [1 - low, 1 + high], unlike the paper's cap.

    Args:
        low: offset of the lower bound from 1.
        high: offset of the upper bound from 1.
    """
    objective = losses.cispo_around_one(low, high)
    return Algorithm(signals.group_norm(), objective, losses.token_mean())


def sapo() -> Algorithm:
    """`loss_mode=sapo`: as published; the aggregation is fixed to the mean over completions."""
    return Algorithm(signals.group_norm(), losses.sapo(), losses.sequence_mean())


def clip_cov() -> Algorithm:
    """`loss_mode=clip_cov`: as published, but for its population: a micro-batch there."""
    return Algorithm(signals.group_norm(), losses.clip_cov(), losses.token_mean())


def kl_cov() -> Algorithm:
    """`loss_mode=kl_cov`: coefficient 0.1 (its documentation says 1); a micro-batch there."""
    return Algorithm(signals.group_norm(), losses.kl_cov(coef=0.1), losses.token_mean())


def dppo() -> Algorithm:
    """`loss_mode=dppo_tv`: as published, ratios truncated at 20."""
    return Algorithm(signals.group_norm(), losses.dppo(), losses.token_mean())


def ppo(gamma: float = 1.0, lam: float = 1.0) -> Algorithm:
    """`adv_estimator=gae`: no KL, `lam` 1, dual clip, value clip 0.5.

    The critic has an optimizer of its own there, so the coefficient of its loss is 1.

    Args:
        gamma: discount per token.
        lam: GAE's trade-off.
    """
    estimate = signals.gae(gamma, lam)
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=losses.clipped(dual=3.0) + 1.0 * losses.value_loss(0.5),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
