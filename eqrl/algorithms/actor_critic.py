"""Algorithms with a critic."""

from .. import _advantages as signals, _losses as losses
from .._checks import check_number
from ._penalised import penalised
from .base import Algorithm


def ppo(
    kl: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    epsilon: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.5,
    value_lam: float | None = None,
) -> Algorithm:
    r"""Proximal policy optimisation with a critic.

    Token-level KL in the reward, GAE, whitened advantages, clipped surrogate plus `value_coef`
    times the clipped value loss, token mean. Targets are GAE advantages plus values, not
    whitened. Meant for several epochs and minibatches per rollout.

    Differs between libraries: verl adds dual clip 3, uses `lam` 1 and a value clip of 0.5; TRL's
    `value_coef` is 0.1; the predecessor had no KL and no factor 1/2.

    Args:
        kl: coefficient of the KL penalty in the reward.
        gamma: discount per token.
        lam: GAE's trade-off between the critic (0) and the sampled return (1).
        epsilon: clip range of the ratio on both sides.
        value_clip: how far a value prediction may move in one rollout; 0 for no bound.
        value_coef: coefficient of the value loss; 0 leaves it out.
        value_lam: GAE's trade-off for the value targets; `lam` by default.

    Source: Schulman et al. 2017 (arXiv:1707.06347).
    """
    check_number("value_coef", value_coef, least=0)
    check_number("value_clip", value_clip, least=0)
    estimate = penalised(kl, signals.gae(gamma, lam))
    target = penalised(kl, signals.gae(gamma, lam if value_lam is None else value_lam))
    objective = losses.clipped(epsilon, epsilon)
    if value_coef:
        objective = objective + value_coef * losses.value_loss(value_clip or None)
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=objective,
        weighting=losses.token_mean(),
        target=target | signals.add_values(),
    )


def vapo(alpha: float = 0.05, value_coef: float = 0.5, nll: float = 0.1) -> Algorithm:
    r"""Value-based augmented PPO, the parts that are estimators and losses.

    Length-adaptive GAE ($\lambda = 1 - 1/(\alpha L)$) whitened for the policy, Monte-Carlo targets
    ($\lambda = 1$) for the critic, clip-higher (0.2, 0.28), token mean, and `nll` times the
    negative log-likelihood of tokens with a positive advantage. No KL.

    Differs from the paper: value pre-training and group sampling are the script's business; the
    likelihood term takes tokens of positive advantage in place of correct completions.

    Args:
        alpha: of the length-adaptive trade-off.
        value_coef: coefficient of the value loss, above 0.
        nll: coefficient of the likelihood term; 0 leaves it out.

    Source: Yue et al. 2025 (arXiv:2504.05118).
    """
    check_number("nll", nll, least=0)
    check_number("value_coef", value_coef, above=0)
    objective = losses.clipped(0.2, 0.28) + value_coef * losses.value_loss()
    if nll:
        objective = objective + nll * losses.positive_nll()
    return Algorithm(
        advantage=signals.gae_adaptive(alpha=alpha) | signals.whiten(),
        objective=objective,
        weighting=losses.token_mean(),
        target=signals.gae(lam=1.0) | signals.add_values(),
    )
