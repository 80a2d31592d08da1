"""A coefficient that grows while the policy's entropy is too low."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_number
from .._lifted import spell
from .._masked import spread, token_share, zero_unmasked
from .._types import Batch, PerToken, ScalarLike
from .base import check_prepared
from .factor import AbstractFactor


class AdaptiveEntropy(AbstractFactor):
    """See `adaptive_entropy`, which builds it. Its state is the coefficient."""

    target: ScalarLike
    step: ScalarLike
    start: ScalarLike
    least: ScalarLike
    most: ScalarLike

    requires = frozenset({"old_entropy"})
    reads_scores = False

    def init(self) -> Float[Array, ""]:
        return jnp.asarray(self.start, jnp.result_type(float))

    def prepare(self, batch: Batch, state: Float[Array, ""]) -> tuple[PerToken, Float[Array, ""]]:
        mask, dtype = batch.rollout.mask, state.dtype
        entropy = zero_unmasked(batch.rollout.need("old_entropy"), mask).astype(dtype)
        mean = jnp.sum(token_share(mask).astype(dtype) * entropy)
        low = mean <= self.target
        moved = jnp.clip(
            jnp.where(low, state + self.step, state - self.step), self.least, self.most
        )
        used = jnp.where(low, state, jnp.zeros_like(state)).astype(batch.advantages.dtype)
        rows = jnp.broadcast_to(used, mask.shape[:1])
        return spread(rows, mask), jnp.where(jnp.any(mask), moved, state).astype(dtype)

    def __call__(self, scores, batch):
        del scores
        check_prepared(self, self.prepare, batch)
        return batch.prepared, {"policy/entropy_coef": batch.mean(batch.prepared)}

    def __repr__(self) -> str:
        names = ("target", "step", "start", "least", "most")
        return spell(adaptive_entropy, {name: getattr(self, name) for name in names})


def adaptive_entropy(
    target: ScalarLike = 0.2,
    *,
    step: ScalarLike = 0.005,
    start: ScalarLike = 0.0,
    least: ScalarLike = 0.0,
    most: ScalarLike = 1.0,
) -> AdaptiveEntropy:
    r"""A coefficient for the entropy bonus that rises while the entropy is too low.

    Write `adaptive_entropy(0.2) * entropy_bonus()`. With $H_k$ the token mean of
    `rollout.old_entropy` over the $k$-th rollout, that rollout trains with
    $c_k\,1[H_k \le target]$, the coefficient *before* it moves; then
    $c_{k+1} = \mathrm{clip}(c_k \pm step, least, most)$, up if $H_k \le target$ and down
    otherwise. So with `start=0` the first rollout has no bonus. A rollout without tokens moves
    nothing.

    Differs between libraries: TRL moves it after every optimizer step, from the entropy of the
    policy in training, and switches it on by the previous step's entropy; the paper leaves it where
    it is when the entropy equals the target.

    Args:
        target: entropy in nats per token below which the bonus works.
        step: how far the coefficient moves after each rollout, from 0.
        start: the first coefficient, from `least` to `most`.
        least: smallest coefficient, from 0.
        most: largest coefficient.

    Returns:
        A factor with state, the coefficient, and metric `policy/entropy_coef` (the one in use);
        requires `rollout.old_entropy`.

    Source: He et al. 2025 (Skywork-OR1, arXiv:2505.22312).
    """
    check_number("target", target)
    check_number("step", step, least=0)
    check_number("least", least, least=0)
    check_number("most", most, least=least if isinstance(least, int | float) else 0)
    check_number(
        "start",
        start,
        least=least if isinstance(least, int | float) else None,
        most=most if isinstance(most, int | float) else None,
    )
    return AdaptiveEntropy(target, step, start, least, most)
