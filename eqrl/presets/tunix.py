"""What Tunix computes with its defaults.

Its GRPO and DAPO take the sampler's log-probs for the old ones (`use_rollout_logps`): set
`rollout.old_logprobs` to `rollout.logprobs` (`--algo.old-logprobs sampler`) for the same ratio. It
clamps log-ratios at 20 nats, where no run that survives comes.
"""

from .. import _advantages as signals, _losses as losses
from .._checks import check_number
from .._losses.base import AbstractTerm
from ..algorithms import Algorithm


def _with_k1(term: AbstractTerm, beta: float) -> AbstractTerm:
    check_number("beta", beta, least=0)
    return term + beta * losses.kl("k1") if beta else term


def grpo(beta: float = 0.04, epsilon: float = 0.2) -> Algorithm:
    """`GRPOConfig`: the paper's, but the KL term is k1 as a loss.

    The gradient of k1 is 0 in expectation: it adds noise and holds nothing back. Take
    `eqrl.algorithms.grpo()` for the paper's k3.

    Args:
        beta: coefficient of the KL term.
        epsilon: clip range of the ratio on both sides.
    """
    objective = _with_k1(losses.clipped(epsilon, epsilon), beta)
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def gspo_token(beta: float = 0.04, epsilon: float = 0.2) -> Algorithm:
    """`loss_algo="gspo-token"`: with GRPO's clip range 0.2, a thousand times the paper's.

    Args:
        beta: coefficient of the KL term.
        epsilon: clip range of the ratio on both sides.
    """
    ratio = losses.geometric_token_ratio()
    objective = _with_k1(losses.clipped(epsilon, epsilon, ratio=ratio), beta)
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

    Its length penalty counts characters; here, tokens.

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
    estimate = signals.gae(1.0, 0.95)
    if beta:
        estimate = signals.kl_penalty(beta, estimator="k3") | estimate
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=losses.clipped() + 1.0 * losses.value_loss(0.2),
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
