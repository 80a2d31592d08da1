"""Truncated importance weights, token by token."""

import jax.numpy as jnp

from .._checks import check_number
from .._types import Batch, Metrics, PerToken, ScalarLike, Scores
from ._mismatch import bounded, log_weight
from .factor import Factor, factor


def tis(cap: ScalarLike | None = 2.0) -> Factor:
    r"""Each token's importance weight between sampler and trainer, from above bounded by `cap`.

    $\min(w_t, cap)$ with $w_t = e^{\log\pi_{old}(t) - \log\pi_{sampler}(t)}$:
    `rollout.old_logprobs` over `rollout.logprobs`. With `old_logprobs` absent the current log-probs
    stand in, gradient stopped; then $w_t$ is the whole ratio to the sampler. The identity where
    sampler and trainer agree. Unmasked positions give 0 and leave before the exponential.

    Differs between libraries: on by default in oat (2), off in verl (`rollout_is="token"`, 2), NeMo
    and TRL (`token_truncate`). All of them weigh the policy term only, after its clip: write
    `tis() * clipped() + 0.04 * kl()`.

    Args:
        cap: largest weight, above 0; `None` for no bound.

    Returns:
        A factor with metrics `mismatch/truncated_frac` and `mismatch/correction_mean`.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; truncation: Ionides 2008.
    """
    if cap is not None:
        check_number("cap", cap, above=0)
    return factor(_tis, builder=tis, cap=cap)


def _tis(scores: Scores, batch: Batch, *, cap: ScalarLike | None) -> tuple[PerToken, Metrics]:
    weight = jnp.exp(log_weight(scores, batch))
    return bounded(weight, weight if cap is None else jnp.minimum(weight, cap), batch)
