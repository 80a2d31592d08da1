"""A bundle of the parts in which one algorithm differs from another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._losses.base import AbstractTerm
from .._masked import token_share, zero_unmasked
from .._select.base import AbstractSelection, apply
from .._transform import AbstractTransform, check_groups
from .._types import Batch, Mask, Metrics, PerToken, Rollout, Scores


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

    def __check_init__(self):
        advantage = self.advantage
        if (advantage.starts or advantage.gathers) and not advantage.spreads:
            raise ValueError(
                f"advantage=`{advantage!r}` ends in one score per completion, so only last tokens "
                "would train; let a baseline or `returns()` follow"
            )

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

    def init(self) -> tuple[Any, Any, Any]:
        """The states of `advantage`, `target` and `objective` before the first batch."""
        target = None if self.target is None else self.target.init()
        return self.advantage.init(), target, self.objective.init()

    def select(self, rollout: Rollout) -> Rollout:
        """The rollout with unselected rows switched off.

        Selecting twice changes nothing if rules on whole groups stand last: `drop_truncated() &
        drop_constant_groups()`.
        """
        return rollout if self.selection is None else apply(rollout, self.selection(rollout))

    def assign(
        self, signal: PerToken, state: tuple[Any, Any, Any], rollout: Rollout
    ) -> tuple[Batch, tuple[Any, Any, Any]]:
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
        advantage_state, target_state, objective_state = state
        advantages, advantage_state = self.advantage.update(signal, advantage_state, rollout)
        targets = None
        if self.target is not None:
            targets, target_state = self.target.update(signal, target_state, rollout)
            targets = zero_unmasked(targets, rollout.mask)
        advantages = zero_unmasked(advantages, rollout.mask)
        batch = self.weigh(Batch(rollout, advantages, advantages, advantages, targets))
        prepared, objective_state = self.objective.prepare(batch, objective_state)
        for x in jax.tree.leaves(prepared):
            if x.shape != rollout.mask.shape:
                raise ValueError(
                    f"the objective prepared an array of shape {x.shape}; `prepare=` must return "
                    f"arrays of the mask's shape {rollout.mask.shape}, which are cut along with it"
                )
        batch = dataclasses.replace(batch, prepared=prepared)
        return lax.stop_gradient(batch), (advantage_state, target_state, objective_state)

    def weigh(self, batch: Batch) -> Batch:
        """The batch with `weights` and `share` recomputed from its mask.

        For rows that make one optimizer step on their own: a minibatch is weighed anew, a
        micro-batch (part of a step) never is. Advantages, targets and what the objective prepared
        stay those of the whole rollout.
        """
        mask, dtype = batch.rollout.mask, batch.advantages.dtype
        weights, share = self.weighting(mask).astype(dtype), token_share(mask).astype(dtype)
        return dataclasses.replace(batch, weights=weights, share=share)

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
