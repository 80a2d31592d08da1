"""Off-policy sequence masking: forgets failures that the policy has already left behind."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import row_means
from .factor import Factor, factor


AGAINST = ("sampler", "old")


def opsm(delta: ScalarLike, *, against: str = "sampler") -> Factor:
    r"""0 on completions of negative advantage that the policy has drifted from, 1 on the others.

    A completion is masked if $\bar A < 0$ and $\frac1L\sum_t (\log\pi_x(t) - \log\pi(t)) > \delta$,
    with $\bar A$ the mean advantage of its masked tokens, $\pi$ the policy *in training* (gradient
    stopped; so the mask tightens from update to update of one rollout) and $\pi_x$ the sampler or
    the old policy. With `against="old"` and no `old_logprobs` nothing is ever masked.

    Differs between libraries: TRL compares with the sampler, as the paper does, and proposes
    delta 0.5; slime compares with the old policy, default 1e-4. The paper states no value, so
    here it must be given.

    Args:
        delta: largest tolerated mean log-ratio in nats per token, from 0.
        against: `"sampler"` (`rollout.logprobs`) or `"old"` (`rollout.old_logprobs`).

    Returns:
        A factor with metric `policy/opsm_masked_frac`.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv:2512.02556).
    """
    check_number("delta", delta, least=0)
    check_choice("against", against, AGAINST)
    return factor(_opsm, builder=opsm, delta=delta, against=against)


def _opsm(
    scores: Scores, batch: Batch, *, delta: ScalarLike, against: str
) -> tuple[PerToken, Metrics]:
    rollout = batch.rollout
    earlier = rollout.logprobs if against == "sampler" else rollout.old_logprobs
    earlier = scores.logprobs if earlier is None else earlier
    gap = lax.stop_gradient(zero_unmasked(earlier - scores.logprobs, rollout.mask))
    failed = row_means(zero_unmasked(batch.advantages, rollout.mask), batch) < 0
    masked = (failed & (row_means(gap, batch) > delta)).astype(gap.dtype)
    return jnp.ones_like(gap) - masked, {"policy/opsm_masked_frac": batch.mean(masked)}
