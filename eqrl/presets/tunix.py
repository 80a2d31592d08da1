"""What Tunix computes with its defaults. It clamps log-ratios at 20 nats, which changes nothing."""

from .. import _advantages as signals, _losses as losses
from ..algorithms import Algorithm


def grpo(beta: float = 0.04, epsilon: float = 0.2) -> Algorithm:
    """`GRPOConfig`: the paper's, but the KL term is k1 as a loss.

    The gradient of k1 is 0 in expectation: it adds noise and holds nothing back. Take
    `eqrl.algorithms.grpo()` for the paper's k3.

    Args:
        beta: coefficient of the KL term.
        epsilon: clip range of the ratio on both sides.
    """
    objective = losses.clipped(epsilon, epsilon) + beta * losses.kl("k1")
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def gspo_token(beta: float = 0.04, epsilon: float = 0.2) -> Algorithm:
    """`loss_algo="gspo-token"`: with GRPO's clip range 0.2, a thousand times the paper's.

    Args:
        beta: coefficient of the KL term.
        epsilon: clip range of the ratio on both sides.
    """
    ratio = losses.geometric_token_ratio()
    objective = losses.clipped(epsilon, epsilon, ratio=ratio) + beta * losses.kl("k1")
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def dr_grpo(max_tokens: int, epsilon: float = 0.2) -> Algorithm:
    """`DrGRPOConfig`: as published, with a KL-free loss over the completion limit.

    Args:
        max_tokens: the constant that replaces the length.
        epsilon: clip range of the ratio on both sides.
    """
    weighting = losses.constant_length(max_tokens)
    return Algorithm(signals.group_center(), losses.clipped(epsilon, epsilon), weighting)


def dapo(max_tokens: int = 20480, buffer: int = 4096) -> Algorithm:
    """`DAPOConfig`: without dynamic sampling, which is a flag there with nothing behind it.

    Args:
        max_tokens: completion limit in tokens.
        buffer: width of the penalty's ramp in tokens.
    """
    shaped = signals.overlong(max_tokens, buffer, capped=False)
    objective, weighting = losses.clipped(0.2, 0.28), losses.token_mean()
    return Algorithm(shaped | signals.group_norm(), objective, weighting)


def ppo(beta: float = 0.04) -> Algorithm:
    """`PPOConfig`: k3 in the reward in place of k1.

    Args:
        beta: coefficient of the KL penalty in the reward.
    """
    estimate = signals.kl_penalty(beta, estimator="k3") | signals.gae(1.0, 0.95)
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=losses.clipped() + 1.0 * losses.value_loss(0.2),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
