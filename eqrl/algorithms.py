"""Named algorithms: each is a few lines of wiring over the public pieces.

Every function returns an `Algorithm`. Print it to see the expressions it is made of; to vary it,
write those expressions yourself. A coefficient of 0 leaves its part out, and with it the forward
pass that the part would have required.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import _advantages as signals, _losses as losses
from ._checks import check_number
from ._losses.base import AbstractTerm
from ._masked import token_share, zero_unmasked
from ._select import AbstractSelection, apply, drop_constant_groups
from ._transform import AbstractTransform, check_groups
from ._types import Batch, Mask, Metrics, PerToken, Rollout, Scores


class Algorithm(eqx.Module):
    """What distinguishes one algorithm from another.

    Attributes:
        advantage: from per-token reward to advantage.
        objective: per-token loss terms.
        weighting: from a mask to the weights of the reduction.
        selection: which completions train; `None` for all.
        target: from per-token reward to value targets; `None` without a critic.
    """

    advantage: AbstractTransform
    objective: AbstractTerm
    weighting: Callable[[Mask], PerToken]
    selection: AbstractSelection | None = None
    target: AbstractTransform | None = None

    @property
    def requires(self) -> frozenset[str]:
        """Names of the optional `Rollout` fields that some part reads."""
        target = frozenset() if self.target is None else self.target.requires
        return self.advantage.requires | self.objective.requires | target

    @property
    def min_group(self) -> int:
        """The least number of completions per prompt that the algorithm can learn from."""
        return max(part.min_group for part in (self.advantage, self.target) if part is not None)

    def check_groups(self, samples_per_prompt: int) -> None:
        """Refuses too few completions per prompt with one sentence that names the part.

        Raises:
            ValueError: if `samples_per_prompt` is below `min_group`.
        """
        for part in (self.advantage, self.target):
            if part is not None:
                check_groups(part, samples_per_prompt)

    def init(self) -> tuple[Any, Any]:
        """The states of `advantage` and `target` before the first batch."""
        return self.advantage.init(), None if self.target is None else self.target.init()

    def select(self, rollout: Rollout) -> Rollout:
        """The rollout with unselected rows switched off; selecting twice changes nothing."""
        return rollout if self.selection is None else apply(rollout, self.selection(rollout))

    def assign(
        self, signal: PerToken, state: tuple[Any, Any], rollout: Rollout
    ) -> tuple[Batch, tuple[Any, Any]]:
        """Everything the loss reads, computed once on all rows of a rollout.

        Args:
            signal: per-token reward; anything on unmasked positions is ignored.
            state: from `init()` or the previous call.
            rollout: the rollout that earned the reward. Rows that `selection` drops are switched
                off first.

        Returns:
            The batch, through which no gradient flows, and the next state.
        """
        signal, rollout = lax.stop_gradient((signal, self.select(rollout)))
        advantage_state, target_state = state
        advantages, advantage_state = self.advantage.update(signal, advantage_state, rollout)
        targets = None
        if self.target is not None:
            targets, target_state = self.target.update(signal, target_state, rollout)
            targets = zero_unmasked(targets, rollout.mask)
        advantages = zero_unmasked(advantages, rollout.mask)
        batch = Batch(rollout, advantages, advantages, advantages, targets)
        return lax.stop_gradient(self.weigh(batch)), (advantage_state, target_state)

    def weigh(self, batch: Batch) -> Batch:
        """The batch with `weights` and `share` recomputed from its mask.

        For rows that make one optimizer step on their own: a minibatch is weighed anew, a
        micro-batch (part of a step) never is.
        """
        mask, dtype = batch.rollout.mask, batch.advantages.dtype
        return Batch(
            rollout=batch.rollout,
            advantages=batch.advantages,
            weights=self.weighting(mask).astype(dtype),
            share=token_share(mask).astype(dtype),
            targets=batch.targets,
        )

    def loss(self, scores: Scores, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """`sum(weights * value)` of this part of the batch, and metrics that add over parts."""
        value, metrics = self.objective(scores, batch)
        total = jnp.sum(batch.weights * zero_unmasked(value, batch.rollout.mask))
        return total, metrics | {"loss/total": total}

    def __repr__(self) -> str:
        parts = {
            "advantage": self.advantage,
            "objective": self.objective,
            "weighting": self.weighting,
            "selection": self.selection,
            "target": self.target,
        }
        lines = [f"    {name}={part!r},\n" for name, part in parts.items() if part is not None]
        return f"Algorithm(\n{''.join(lines)})"


def _penalised(kl: float, rest: AbstractTransform) -> AbstractTransform:
    """`kl_penalty(kl) | rest`, or `rest` alone for a coefficient of 0."""
    check_number("kl", kl, least=0)
    return signals.kl_penalty(kl) | rest if kl else rest


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
    return Algorithm(_penalised(kl, signals.rloo()), losses.reinforce(), losses.sequence_sum())


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
    advantage = _penalised(kl, signals.returns(gamma) | signals.whiten())
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


def ppo(
    kl: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    epsilon: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.5,
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

    Source: Schulman et al. 2017 (arXiv:1707.06347).
    """
    check_number("value_coef", value_coef, least=0)
    check_number("value_clip", value_clip, least=0)
    estimate = _penalised(kl, signals.gae(gamma, lam))
    objective = losses.clipped(epsilon, epsilon)
    if value_coef:
        objective = objective + value_coef * losses.value_loss(value_clip or None)
    return Algorithm(
        advantage=estimate | signals.whiten(),
        objective=objective,
        weighting=losses.token_mean(),
        target=estimate | signals.add_values(),
    )
