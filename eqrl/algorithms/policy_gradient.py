"""Policy gradients: a baseline, and the log-likelihood gradient."""

from .. import _advantages as signals, _losses as losses
from .._checks import check_number
from ._penalised import penalised
from .base import Algorithm


def reinforce() -> Algorithm:
    r"""REINFORCE with the batch's mean score as the baseline.

    $-\frac1{B}\sum_i (r_i - \bar r) \sum_t \nabla\log\pi(t)$: sum over tokens, mean over
    completions. No ratio, no clip, no KL; one update per rollout.

    Differs between libraries: verl's and TRL's have no baseline unless given one; the
    predecessor's averaged over tokens.

    Source: Williams 1992.
    """
    return Algorithm(signals.batch_center(), losses.reinforce(), losses.sequence_sum())


def rloo(kl: float = 0.05) -> Algorithm:
    r"""REINFORCE leave-one-out.

    $r_i - \beta\sum_t k1_t$ minus the same of the group's other completions, times the
    log-likelihood gradient of the whole completion, mean over completions. The KL enters before
    the baseline. One update per rollout.

    Differs between libraries: TRL clips a sequence-level ratio at 0.2 (same gradient on the first
    update); verl and OpenRLHF clip a token ratio and average over tokens.

    Args:
        kl: coefficient of the KL penalty in the reward.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    return Algorithm(penalised(kl, signals.rloo()), losses.reinforce(), losses.sequence_sum())


def reinforce_pp(kl: float = 0.01, gamma: float = 1.0, epsilon: float = 0.2) -> Algorithm:
    r"""REINFORCE++: token-level KL in the reward, returns, whitening over the whole batch.

    $R_t = r\,[t\ \text{last}] - \beta\,k1_t$, $G_t = R_t + \gamma G_{t+1}$, whitened over all
    tokens of the batch, clipped surrogate, token mean. No group is compared with itself.

    Differs between libraries: OpenRLHF clamps k1 and whitens with n, verl has no KL by default;
    the predecessor's was its RLOO under another name.

    Args:
        kl: coefficient of the KL penalty in the reward.
        gamma: discount per token.
        epsilon: clip range of the ratio on both sides.

    Source: Hu et al. 2025 (arXiv:2501.03262).
    """
    advantage = penalised(kl, signals.returns(gamma) | signals.whiten())
    return Algorithm(advantage, losses.clipped(epsilon, epsilon), losses.token_mean())


def reinforce_pp_baseline(kl: float = 0.01, epsilon: float = 0.2) -> Algorithm:
    r"""REINFORCE++ with the group's mean score as the baseline.

    $A_t = r - \bar r_g - \beta\,k1_t$, whitened over all tokens of the batch, clipped surrogate,
    token mean. Each token bears its own KL only. Whitening shifts by the token-weighted mean, so
    a constant group need not end at exactly 0.

    Differs between libraries: slime and NeMo as here; OpenRLHF sums the KL of later tokens; verl
    puts it before the baseline.

    Args:
        kl: coefficient of the per-token KL penalty.
        epsilon: clip range of the ratio on both sides.

    Source: Hu et al. 2025 (arXiv:2501.03262).
    """
    check_number("kl", kl, least=0)
    advantage = signals.group_center()
    if kl:
        advantage = advantage | signals.kl_penalty(kl)
    objective = losses.clipped(epsilon, epsilon)
    return Algorithm(advantage | signals.whiten(), objective, losses.token_mean())


def remax(kl: float = 0.0) -> Algorithm:
    r"""ReMax: the reward of a greedy completion is the baseline.

    $A_t = \sum_{s \ge t} R_s - r(\text{greedy})$, times the log-likelihood gradient of the whole
    completion, mean over completions. Needs one greedy completion per prompt, which `requires`
    asks the sampling loop for (`rollout.greedy_rewards`); one completion per prompt is enough.

    Differs between libraries: verl runs it through the clipped surrogate and the token mean.

    Args:
        kl: coefficient of a per-token KL penalty in the reward.

    Source: Li et al. 2023 (arXiv:2310.10505).
    """
    return Algorithm(penalised(kl, signals.remax()), losses.reinforce(), losses.sequence_sum())


def opo() -> Algorithm:
    r"""On-policy optimisation with the optimal baseline.

    Scores minus the group's length-weighted mean score, times the log-likelihood gradient of the
    whole completion, mean over completions. Exactly on-policy: one update per rollout, no ratio,
    no KL.

    Differs between libraries: verl's "opo" is this advantage in its clipped surrogate with token
    mean.

    Source: Hao et al. 2025 (arXiv:2505.23585).
    """
    return Algorithm(signals.opo(), losses.reinforce(), losses.sequence_sum())


def gpg(f_norm: float = 1.0) -> Algorithm:
    r"""Group policy gradient: centred scores, scaled up for groups without signal.

    $A = \alpha (r - \bar r_g) / f\_norm$ with $\alpha$ the batch size over the number of non-zero
    scores, plain policy gradient, token mean. No ratio, no clip, no KL.

    Args:
        f_norm: divides the advantage.

    Source: Chu et al. 2025 (arXiv:2504.02546).
    """
    return Algorithm(signals.gpg(f_norm), losses.reinforce(), losses.token_mean())


def max_rl() -> Algorithm:
    r"""MaxRL: advantages relative to the group's mean score.

    $A = (r - \bar r_g) / \bar r_g$, so that rarely solved prompts weigh more: the gradient of the
    log of the success rate, to first order. Log-likelihood gradient of the whole completion, mean
    over completions. Scores must not be negative.

    Source: 2026 (arXiv:2602.02710).
    """
    return Algorithm(signals.max_rl(), losses.reinforce(), losses.sequence_sum())


def pkpo(k: int) -> Algorithm:
    r"""Pass@k policy optimisation: rewards the best of k instead of the average one.

    Each completion earns what it adds to the maximum over k-subsets of its group
    (`pass_at_k(k)`), times the log-likelihood gradient of the whole completion, mean over
    completions.

    Differs between libraries: verl's GRPO_PASSK is `k` = group size over the group's deviation,
    `pass_at_k(n, eps=1e-6)`, in the clipped surrogate.

    Args:
        k: how many attempts count as one, from 2 to the group size.

    Source: Walder and Karkhanis 2025 (arXiv:2505.15201).
    """
    return Algorithm(signals.pass_at_k(k), losses.reinforce(), losses.sequence_sum())
