"""The GRPO family: scores relative to the group's, and a clipped surrogate."""

from .. import _advantages as signals, _losses as losses
from .._checks import check_number
from .._select import drop_constant_groups
from .base import Algorithm


def grpo(epsilon: float = 0.2, kl: float = 0.04) -> Algorithm:
    r"""Group relative policy optimisation, as first published.

    Scores standardised within the group (deviation with n - 1), clipped surrogate, k3 against the
    reference as a loss, token mean within a completion, then mean over completions.

    Differs between libraries: TRL's defaults are no KL, token mean and deviation + 1e-4; verl's no
    KL and token mean; NeMo's takes mean and deviation over the other completions.

    Args:
        epsilon: clip range of the ratio on both sides.
        kl: coefficient of the KL term in the loss.

    Source: Shao et al. 2024 (arXiv:2402.03300).
    """
    check_number("kl", kl, least=0)
    objective = losses.clipped(epsilon, epsilon)
    if kl:
        objective = objective + kl * losses.kl()
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


def dr_grpo(max_tokens: int, epsilon: float = 0.2) -> Algorithm:
    r"""GRPO done right: no division by deviation, none by length.

    Scores minus group mean, clipped surrogate, token sum over `max_tokens`, mean over completions.

    Differs between libraries: OpenRLHF and prime-rl change the advantage only; in TRL and verl
    the two halves are two switches.

    Args:
        max_tokens: the constant that replaces the length, usually the completion limit.
        epsilon: clip range of the ratio on both sides.

    Source: Liu et al. 2025 (arXiv:2503.20783).
    """
    objective = losses.clipped(epsilon, epsilon)
    return Algorithm(signals.group_center(), objective, losses.constant_length(max_tokens))


def dapo(
    max_tokens: int,
    *,
    low: float = 0.2,
    high: float = 0.28,
    buffer: int | None = None,
    penalty: float = 1.0,
) -> Algorithm:
    r"""Decoupled clip and dynamic sampling policy optimisation, all four parts.

    Soft penalty near the length limit, scores standardised within the group, clip-higher, token
    mean, and only groups whose raw rewards differ (a sampler refills the batch). No KL.

    Differs between libraries: TRL has no dynamic sampling; OpenRLHF filters on the mean reward;
    the predecessor's "dapo" was `group_norm() + 0.2 * batch_norm()`.

    Args:
        max_tokens: completion limit in tokens, where the length penalty is complete.
        low: how far the ratio may fall and still be rewarded.
        high: how far it may rise.
        buffer: width of the penalty's ramp in tokens, a quarter of `max_tokens` by default
            (paper: 4,096 before 20,480); 0 leaves the penalty out.
        penalty: the largest length penalty; 0 leaves it out.

    Source: Yu et al. 2025 (arXiv:2503.14476).
    """
    buffer = max(1, max_tokens // 4) if buffer is None else buffer
    check_number("buffer", buffer, least=0)
    advantage = signals.group_norm()
    if buffer and penalty:
        advantage = signals.overlong(max_tokens, buffer, penalty=penalty) | advantage
    objective, weighting = losses.clipped(low, high), losses.token_mean()
    return Algorithm(advantage, objective, weighting, drop_constant_groups())


def lite_ppo(epsilon: float = 0.2) -> Algorithm:
    r"""Lite PPO: mean of the group, deviation of the batch.

    $A = (r - \bar r_g) / (s + eps)$ with $s$ the deviation of all scores of the batch, clipped
    surrogate, token mean, no KL. A group of near-equal scores is not blown up.

    Args:
        epsilon: clip range of the ratio on both sides.

    Source: Liu et al. 2025 (arXiv:2508.08221).
    """
    advantage = signals.group_norm(deviation="batch")
    return Algorithm(advantage, losses.clipped(epsilon, epsilon), losses.token_mean())


def gdpo(*weights: float, epsilon: float = 0.2) -> Algorithm:
    r"""Group reward-decoupled normalisation: each reward component is standardised on its own.

    Every component standardised within its group, summed with `weights`, standardised over the
    batch's completions; clipped surrogate, token mean within a completion, then mean over
    completions. No KL.

    Differs between libraries: TRL's last step as here, with 1e-4 beside the deviation; verl's is
    over tokens (`gdpo() | returns() | whiten()`); NeMo takes the other completions' mean.

    Args:
        *weights: one a component of `rollout.rewards`; 1 each by default.
        epsilon: clip range of the ratio on both sides.

    Source: 2026 (arXiv:2601.05242).
    """
    advantage = signals.gdpo(*weights) | signals.batch_norm()
    return Algorithm(advantage, losses.clipped(epsilon, epsilon), losses.sequence_mean())
