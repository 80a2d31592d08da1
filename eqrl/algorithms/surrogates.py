"""GRPO advantages under other surrogates: what bounds the step."""

from .. import _advantages as signals, _losses as losses
from .base import Algorithm


def gspo(low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    r"""Group sequence policy optimisation: whole completions are clipped.

    Scores standardised within the group, clipped surrogate on the geometric mean of the token
    ratios, mean over completions. No KL.

    Differs between libraries: TRL's default token mean weighs completions by length; AReaL
    averages over tokens too; verl differentiates each token's own ratio (the same gradient here).

    Args:
        low: how far the sequence ratio may fall and still be rewarded.
        high: how far it may rise.

    Source: Zheng et al. 2025 (arXiv:2507.18071).
    """
    objective = losses.clipped(low, high, ratio=losses.geometric_ratio())
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def luspo(low: float = 3e-4, high: float = 4e-4) -> Algorithm:
    r"""Length-unbiased sequence policy optimisation: GSPO, each completion times its length.

    Args:
        low: how far the sequence ratio may fall and still be rewarded.
        high: how far it may rise.

    Source: TRL's "luspo".
    """
    objective = losses.clipped(low, high, ratio=losses.geometric_ratio())
    return Algorithm(signals.group_norm(), objective, losses.sequence_sum())


def cispo(max_weight: float = 5.0) -> Algorithm:
    r"""Clipped importance-sampling policy optimisation: the weight is capped, no token is dropped.

    Scores standardised within the group, $-\mathrm{sg}(\min(\rho, max\_weight))\,A\,\nabla
    \log\pi$, token mean. No KL. `max_weight` is the largest weight itself, not its offset from 1.

    Differs between libraries: TRL and Liger cap as here; verl, AReaL, slime and NeMo clip to an
    interval around 1 (`cispo_around_one`).

    Args:
        max_weight: largest importance weight.

    Source: MiniMax 2025 (M1, arXiv:2506.13585).
    """
    return Algorithm(signals.group_norm(), losses.cispo(max_weight), losses.token_mean())


def sapo(positive: float = 1.0, negative: float = 1.05) -> Algorithm:
    r"""Soft adaptive policy optimisation: a sigmoid of the ratio in place of the clip.

    Scores standardised within the group, soft gate, token mean within a completion, then mean over
    completions. No KL.

    Args:
        positive: temperature of the gate for positive advantages.
        negative: for negative ones; larger lets go of them sooner.

    Source: 2025 (arXiv:2511.20347).
    """
    objective = losses.sapo(positive, negative)
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def gmpo(low: float = 0.4, high: float = 0.4) -> Algorithm:
    r"""Geometric-mean policy optimisation: token log-ratios are clipped, then averaged.

    Scores standardised within the group, geometric mean of clipped token ratios, mean over
    completions. No KL.

    Differs between libraries: verl's takes its general clip range 0.2 for the bounds and counts
    empty rows.

    Args:
        low: bound on the log-ratio below, in nats.
        high: bound above.

    Source: Zhao et al. 2025 (arXiv:2507.20673).
    """
    return Algorithm(signals.group_norm(), losses.gmpo(low, high), losses.sequence_mean())


def dppo(low: float = 0.2, high: float = 0.2, max_weight: float = 20.0) -> Algorithm:
    r"""Divergence PPO: tokens leave when their probability, not their ratio, has moved too far.

    Scores standardised within the group, total-variation mask, truncated ratio as weight, token
    mean. No KL.

    Differs between libraries: prime-rl's default loss measures against the sampler's log-probs,
    does not truncate and adds 1e-3 times the squared log-ratio.

    Args:
        low: how far a token's probability may fall when its advantage is negative.
        high: how far it may rise when its advantage is positive.
        max_weight: largest ratio that weighs a gradient.

    Source: 2026 (arXiv:2602.04879).
    """
    objective = losses.dppo(low, high, max_weight=max_weight)
    return Algorithm(signals.group_norm(), objective, losses.token_mean())


def vespo() -> Algorithm:
    r"""VESPO: a smooth weight of the completion's product ratio in place of the clip.

    Scores standardised within the group, `vespo()`, token mean. No KL.

    Source: 2026 (arXiv:2602.10693).
    """
    return Algorithm(signals.group_norm(), losses.vespo(), losses.token_mean())


def clip_cov(share: float = 0.0002) -> Algorithm:
    r"""Clip-Cov: against entropy collapse, tokens of high covariance are left out at random.

    Scores standardised within the group, `clip_cov(share)`, token mean. No KL.

    Args:
        share: of the tokens that are left out.

    Source: Cui et al. 2025 (arXiv:2505.22617).
    """
    return Algorithm(signals.group_norm(), losses.clip_cov(share), losses.token_mean())


def kl_cov(share: float = 0.0002, coef: float = 1.0) -> Algorithm:
    r"""KL-Cov: against entropy collapse, tokens of the highest covariance are held back.

    Scores standardised within the group, `kl_cov(share)`, token mean. No clip.

    Differs between libraries: verl's code has `coef` 0.1 by default, its documentation 1.

    Args:
        share: of the tokens that are held back.
        coef: of the penalty on their log-ratio.

    Source: Cui et al. 2025 (arXiv:2505.22617).
    """
    return Algorithm(signals.group_norm(), losses.kl_cov(share, coef=coef), losses.token_mean())


def m2po(budget: float = 0.04) -> Algorithm:
    r"""Second-moment trust: the stalest tokens leave, the rest is not clipped.

    Scores standardised within the group; of the tokens that a clip could act on, those whose
    squared log-ratio between trainer and sampler is largest are masked until its mean over the
    rest is at most `budget`; unclipped surrogate, weighed by the whole ratio to the sampler, mean
    over all tokens. For rollouts of older policies.

    Differs between libraries: AReaL's counts all tokens (`m2po(budget, everywhere=True)`), and
    divides by kept ones (`normalised(m2po(budget))`).

    Args:
        budget: largest second moment of the log-ratio over kept tokens.

    Source: Zheng et al. 2025 (arXiv:2510.01161).
    """
    objective = losses.m2po(budget) * losses.tis(None) * losses.unclipped()
    return Algorithm(signals.group_norm(), objective, losses.token_mean())
