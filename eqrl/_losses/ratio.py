"""Ratios: how far the policy in training is from the one that sampled, per token or per sequence.

A ratio maps `(scores, batch)` to a *log*-ratio `[batch time]`; surrogates such as `clipped` and
`cispo` exponentiate it. Which one is used decides whether a token or a whole completion is clipped.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from .._lifted import Lifted, lift
from .._masked import row_length, row_total, spread, zero_unmasked
from .._types import Batch, PerToken, Scores


def log_ratio(scores: Scores, batch: Batch) -> PerToken:
    """`logp - logp_old` per token, zero on unmasked positions.

    With `rollout.old_logprobs` absent, the rollout serves a single update: the old log-probs are
    the current ones with the gradient stopped, the ratio is 1 and its gradient is `grad logp`.
    """
    old = batch.rollout.old_logprobs
    old = lax.stop_gradient(scores.logprobs) if old is None else old
    return zero_unmasked(scores.logprobs - old, batch.rollout.mask)


class Ratio(eqx.Module):
    """A function `(scores, batch, **hyperparameters) -> log-ratio`; prints as its builder."""

    lifted: Lifted

    def __call__(self, scores: Scores, batch: Batch) -> PerToken:
        return self.lifted(scores, batch)

    def __repr__(self) -> str:
        return repr(self.lifted)


def ratio(
    fn: Callable[..., PerToken], *, builder: Callable | None = None, **hyperparameters: Any
) -> Ratio:
    """Lifts a typed function to a ratio.

    Args:
        fn: `(scores, batch, **hyperparameters) -> log-ratio [batch time]`, 0 where unmasked.
        builder: the public function that the ratio prints as; `fn` itself by default.
        **hyperparameters: passed to `fn` by keyword.

    Returns:
        A ratio that prints and compares like the built-in ones.
    """
    return Ratio(lift(fn, builder, hyperparameters))


def check_ratio(ratio: Any) -> None:
    """Refuses what is no ratio, with one sentence."""
    if ratio is not None and not isinstance(ratio, Ratio):
        raise ValueError(f"ratio={ratio!r} is no ratio; pass one such as `geometric_ratio()`")


def token_ratio() -> Ratio:
    r"""Each token's own ratio: $\Delta_t = \log\pi(t) - \log\pi_{old}(t)$.

    What every surrogate uses unless told otherwise.

    Source: Schulman et al. 2017 (PPO, arXiv:1707.06347).
    """
    return ratio(log_ratio, builder=token_ratio)


def sequence_ratio() -> Ratio:
    r"""The whole completion's probability ratio: $\sum_s \Delta_s$, on each of its tokens.

    Not normalised by length, so its logarithm grows with it. Under `sequence_mean()` a completion's
    surrogate counts once, and its gradient is that of the product of all token ratios.

    Differs between libraries: "sequence ratio" is this product in TRL (its RLOO), verl and NeMo,
    the geometric mean in AReaL and OpenRLHF.

    Source: Ahmadian et al. 2024 (RLOO, arXiv:2402.14740), taking a completion for one action.
    """
    return ratio(_sequence_ratio, builder=sequence_ratio)


def _sequence_ratio(scores: Scores, batch: Batch) -> PerToken:
    mask = batch.rollout.mask
    return spread(row_total(log_ratio(scores, batch), mask), mask)


def geometric_ratio() -> Ratio:
    r"""GSPO's ratio: $\frac1L \sum_s \Delta_s$ on each of the completion's $L$ tokens.

    Its exponential is the geometric mean of the token ratios. The gradient of one token's value
    goes to all tokens of the completion, $1/L$ each.

    Source: Zheng et al. 2025 (GSPO, arXiv:2507.18071), equation 7.
    """
    return ratio(_geometric_ratio, builder=geometric_ratio)


def _geometric_ratio(scores: Scores, batch: Batch) -> PerToken:
    mask = batch.rollout.mask
    delta = log_ratio(scores, batch)
    length = jnp.maximum(row_length(mask), 1).astype(delta.dtype)
    return spread(row_total(delta, mask) / length, mask)


def geometric_token_ratio() -> Ratio:
    r"""GSPO-token's ratio: the value of `geometric_ratio`, the gradient of the token's own.

    $\mathrm{sg}(\frac1L\sum_s\Delta_s) + \log\pi(t) - \mathrm{sg}(\log\pi(t))$. Equal to
    `geometric_ratio` in value and gradient where every token of a completion has the same
    advantage and weight; the form for per-token advantages.

    Source: Zheng et al. 2025 (GSPO, arXiv:2507.18071), equation 15.
    """
    return ratio(_geometric_token_ratio, builder=geometric_token_ratio)


def _geometric_token_ratio(scores: Scores, batch: Batch) -> PerToken:
    logprobs = zero_unmasked(scores.logprobs, batch.rollout.mask)
    moving = logprobs - lax.stop_gradient(logprobs)  # exactly 0, with the token's gradient
    return lax.stop_gradient(_geometric_ratio(scores, batch)) + moving
