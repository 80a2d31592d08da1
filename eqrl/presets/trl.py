"""What TRL computes with its defaults.

Its trainers on vLLM rollouts also mask whole completions whose product of sampler-trainer ratios
exceeds 3 (on by default, though its documentation describes truncation): the `sequence_mask(3.0)`
below. Where sampler and trainer agree it multiplies by 1.
"""

from .. import _advantages as signals, _losses as losses
from .._checks import check_number
from .._losses.base import AbstractTerm
from ..algorithms import Algorithm
from ..algorithms._penalised import penalised


def _corrected(term: AbstractTerm, beta: float) -> AbstractTerm:
    """The correction, the term, and k3 if it has a coefficient."""
    check_number("beta", beta, least=0)
    objective = losses.sequence_mask(3.0) * term
    return objective + beta * losses.kl() if beta else objective


def grpo(beta: float = 0.0, epsilon: float = 0.2) -> Algorithm:
    """`GRPOTrainer`: the paper's, with deviation + 1e-4, no KL, and DAPO's token mean.

    Args:
        beta: coefficient of k3 in the loss.
        epsilon: clip range of the ratio on both sides.
    """
    objective = _corrected(losses.clipped(epsilon, epsilon), beta)
    return Algorithm(signals.group_norm(eps=1e-4), objective, losses.token_mean())


def dr_grpo(max_tokens: int, beta: float = 0.0, epsilon: float = 0.2) -> Algorithm:
    """`GRPOTrainer` with `loss_type="dr_grpo"` and `scale_rewards="none"`: all rows count.

    Args:
        max_tokens: TRL's `max_completion_length`.
        beta: coefficient of k3 in the loss.
        epsilon: clip range of the ratio on both sides.
    """
    weighting = losses.constant_length(max_tokens, count_empty=True)
    objective = _corrected(losses.clipped(epsilon, epsilon), beta)
    return Algorithm(signals.group_center(), objective, weighting)


def gspo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """`importance_sampling_level="sequence"` alone: token mean, so long completions weigh more.

    Its clip range stays that of GRPO then, hundreds of times the paper's (3e-4, 4e-4).

    Args:
        low: how far the sequence ratio may fall and still be rewarded.
        high: how far it may rise.
    """
    objective = _corrected(losses.clipped(low, high, ratio=losses.geometric_ratio()), 0)
    return Algorithm(signals.group_norm(eps=1e-4), objective, losses.token_mean())


def cispo(max_weight: float = 5.0) -> Algorithm:
    """`loss_type="cispo"` with `epsilon_high=max_weight`, which TRL takes for the cap itself.

    Leaving TRL's own default of 0.2 there caps every weight at 0.2.

    Args:
        max_weight: largest importance weight.
    """
    objective = _corrected(losses.cispo(max_weight), 0)
    return Algorithm(signals.group_norm(eps=1e-4), objective, losses.token_mean())


def lite_ppo() -> Algorithm:
    """`scale_rewards="batch"`: deviation of the batch + 1e-4."""
    advantage = signals.group_norm(eps=1e-4, deviation="batch")
    return Algorithm(advantage, _corrected(losses.clipped(), 0), losses.token_mean())


def luspo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """`loss_type="luspo"`: GSPO times length, with GRPO's clip range and all rows counted.

    Args:
        low: how far the sequence ratio may fall and still be rewarded.
        high: how far it may rise.
    """
    objective = _corrected(losses.clipped(low, high, ratio=losses.geometric_ratio()), 0)
    weighting = losses.sequence_sum(count_empty=True)
    return Algorithm(signals.group_norm(eps=1e-4), objective, weighting)


def vespo() -> Algorithm:
    """`loss_type="vespo"`: as published, with deviation + 1e-4 and token mean."""
    objective = _corrected(losses.vespo(), 0)
    return Algorithm(signals.group_norm(eps=1e-4), objective, losses.token_mean())


def sapo() -> Algorithm:
    """`loss_type="sapo"`: the paper's, with deviation + 1e-4 and empty rows counted."""
    objective, weighting = _corrected(losses.sapo(), 0), losses.sequence_mean(count_empty=True)
    return Algorithm(signals.group_norm(eps=1e-4), objective, weighting)


def gdpo(*weights: float) -> Algorithm:
    """`multi_objective_aggregation="normalize_then_sum"`: samples, deviation + 1e-4, token mean.

    Args:
        *weights: TRL's `reward_weights`.
    """
    advantage = signals.gdpo(*weights, eps=1e-4) | signals.batch_norm(eps=1e-4)
    return Algorithm(advantage, _corrected(losses.clipped(), 0), losses.token_mean())


def rloo(beta: float = 0.05, epsilon: float = 0.2) -> Algorithm:
    """`RLOOTrainer`: the paper's advantage, and a clip on the whole completion's ratio.

    On the first update after sampling its gradient equals `eqrl.algorithms.rloo()`.

    Args:
        beta: coefficient of the KL sum that is taken from the reward before the baseline.
        epsilon: clip range of the product ratio.
    """
    objective = losses.clipped(epsilon, epsilon, ratio=losses.sequence_ratio())
    weighting = losses.sequence_mean(count_empty=True)
    return Algorithm(penalised(beta, signals.rloo()), objective, weighting)


def ppo() -> Algorithm:
    """`PPOTrainer` (experimental): value coefficient 0.1; whitened per process there."""
    estimate = signals.kl_penalty(0.05) | signals.gae(1.0, 0.95)
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=losses.clipped() + 0.1 * losses.value_loss(),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
