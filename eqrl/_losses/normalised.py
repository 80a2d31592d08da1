"""Factors that leave the size of the step alone."""

import jax.numpy as jnp
from jax import lax

from .._lifted import spell
from .._masked import spread, zero_unmasked
from .._select.base import AbstractSelection
from .base import check_prepared
from .factor import AbstractFactor, as_factor, before_update, with_prepared


class Normalised(AbstractFactor):
    """See `normalised`, which builds it."""

    factor: AbstractFactor

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        judged = {"old_logprobs"} if self.factor.reads_scores else set()
        return self.factor.requires | judged

    @property
    def reads_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.factor.reads_scores

    def init(self):
        return self.factor.init()

    def prepare(self, batch, state):
        mask = batch.rollout.mask
        prepared, state = self.factor.prepare(batch, state)
        value, _ = self.factor(
            before_update(batch, self.reads_scores), with_prepared(batch, prepared)
        )
        weights = batch.weights  # 0 on unmasked positions, as every weighting leaves them
        total = jnp.sum(weights)
        safe = jnp.where(total > 0, total, jnp.ones_like(total))
        mean = lax.stop_gradient(jnp.sum(weights * zero_unmasked(value, mask)) / safe)
        return (prepared, spread(jnp.broadcast_to(mean, mask.shape[:1]), mask)), state

    def __call__(self, scores, batch):
        check_prepared(self, self.prepare, batch)
        prepared, mean = batch.prepared
        value, metrics = self.factor(scores, with_prepared(batch, prepared))
        some = mean > 0
        safe = jnp.where(some, mean, jnp.ones_like(mean))
        value = jnp.where(some, value / safe, jnp.zeros_like(value))
        return value, metrics | {"policy/factor_mean": batch.mean(mean)}

    def __repr__(self) -> str:
        return spell(normalised, {"factor": self.factor})


def normalised(factor: AbstractFactor | AbstractSelection) -> Normalised:
    r"""The factor divided by its weighted mean over the rollout, so that the step keeps its size.

    $f_t / c$ with $c = \sum_t \omega_t f_t / \sum_t \omega_t$, where $\omega$ are the weights of
    the reduction, and the sums run over all masked tokens of the rollout, with $f$ judged at the
    policy that sampled (`rollout.old_logprobs`, where $f$ depends on it). Of a mask, what remains
    carries the full weight: under `token_mean()`, "divide by kept tokens". Of importance weights,
    this is self-normalised importance sampling: their mean becomes 1. 0 everywhere if nothing is
    kept ($c = 0$). A minibatch is divided by the $c$ of its whole rollout.

    Differs between libraries: verl's decoupled mode divides by kept tokens; its bypass mode, TRL,
    AReaL and slime by all tokens. verl's `rollout_is_batch_normalize` is the self-normalised form.

    Args:
        factor: a factor or a selection, never negative: `normalised(icepop(0.5, 5.0))`.

    Returns:
        A factor with the metrics of `factor` (taken before the division) and `policy/factor_mean`
        (c); requires `rollout.old_logprobs` if `factor` depends on the policy in training.

    Source: Hesterberg 1995 for the self-normalised form.
    """
    if not isinstance(factor, AbstractFactor | AbstractSelection):
        raise ValueError(
            f"factor={factor!r} is neither a factor nor a selection; pass one such as `icepop()`"
        )
    inner = as_factor(factor)
    assert inner is not None
    return Normalised(inner)
