"""Whether an engine samples what it was asked for: its rollout against the policy's own forward."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._logprobs import token_logprobs
from .._pack import compact
from .._types import Rollout
from ..models import Transformer, previous
from .base import Sampling
from .engine import EngineError


_ROWS = 8
# Relative step in temperature; the derivative's error is about 1% for gaps of ten nats.
_STEP = 0.02
# The probability of a false alarm is at most exp(-18) on each side, that of 6 standard deviations.
_ALARM = 18.0


def verify(
    policy: Transformer, rollout: Rollout, sampling: Sampling, *, tolerance: float, who: str
) -> None:
    """Compares a few rows with what the policy itself says of them.

    Log-probs first: a mean absolute difference above `tolerance` is an error. Then, unless greedy,
    the samples: log-probs that agree do not show that a top-k, top-p, min-p or penalty had a hand
    in the choice. With H the entropy, `d = logp + H` has mean 0 given the tokens before, its
    variance is `T dH/dT`, and `d <= H`; so Freedman's inequality bounds how far the sum of `d` may
    go (Annals of Probability 3(1), 1975).

    Args:
        policy: that sampled it.
        rollout: what the engine answered.
        sampling: what it was asked.
        tolerance: of the mean absolute difference of log-probs, in nats.
        who: names the engine in messages.

    Raises:
        EngineError: if they disagree, with the cause that fits.
    """
    part = compact(_some(rollout))
    temperature = float(sampling.temperature) or 1.0
    at = np.array([1, 1 - _STEP, 1 + _STEP, 1 / temperature], np.float32) * temperature
    logprobs, entropy = (
        np.asarray(x, np.float64) for x in _scores(policy, part, jnp.asarray(at, jnp.float32))
    )
    mask = np.asarray(part.mask)
    theirs = np.asarray(part.logprobs, np.float64)
    own, plain = logprobs[0], logprobs[3]
    apart = float(np.mean(np.abs(theirs - own)[mask]))
    if not apart <= tolerance:
        cause = _cause(theirs, own, plain, mask, tolerance, temperature)
        raise EngineError(
            f"{who} answers log-probs that are {apart:.3g} nats off the policy's own on average "
            f"(tolerance={tolerance:g}); {cause}"
        )
    if sampling.temperature > 0:
        variance = np.maximum((entropy[2] - entropy[1]) / (2 * _STEP), 0)
        d, variance, of_token = (x[mask] for x in (own + entropy[0], variance, entropy[0]))
        _check_samples(*surprise(d, variance, of_token, slack=apart), who)


def _check_samples(high: float, low: float, who: str) -> None:
    if max(high, low) > _ALARM:
        raise EngineError(
            f"{who} answers the policy's log-probs but tokens that are "
            + (
                "too likely to be drawn from all of its distribution; turn off top-k, top-p and "
                "min-p there, and any temperature of its own"
                if high > low
                else "too unlikely to be drawn from its distribution; turn off repetition "
                "penalties there, and any temperature of its own"
            )
        )


def surprise(
    d: np.ndarray, variance: np.ndarray, entropy: np.ndarray, *, slack: float = 0.0
) -> tuple[float, float]:
    """Minus the log of bounds on the probability that sums of `d` this high, and this low, occur.

    Args:
        d: log-prob plus entropy of each sampled token.
        variance: of each, given the tokens before it.
        entropy: of the distribution of each, in nats; `d` is at most that.
        slack: how far the mean of `d` may be from 0 because the engine rounds otherwise.
    """
    bound = float(entropy.max())
    # Below, `d` has no bound; cut off at minus the bound its mean can only rise, so that a low sum
    # is as surprising as the bound says, or more.
    sums = d.sum(), -np.maximum(d, -bound).sum()
    # Rounding must not count where the policy is certain of every token.
    allowed = (slack + 1e-5) * d.size
    excess = np.maximum(np.array(sums) - allowed, 0)
    high, low = excess**2 / (2 * (variance.sum() + bound * excess / 3) + 1e-3)
    return float(high), float(low)


def _cause(theirs, own, plain, mask, tolerance: float, temperature: float) -> str:
    first = np.arange(mask.shape[1]) == mask.argmax(axis=1)[:, None]
    mean = lambda x, where: np.abs(x)[where].mean() if where.any() else np.inf  # noqa: E731
    if temperature != 1 and mean(theirs - plain, mask) <= tolerance:
        return (
            f"they are those at temperature 1, so have it answer those at temperature "
            f"{temperature:g} (vLLM: --logprobs-mode processed_logprobs)"
        )
    if ((theirs - own)[mask] > -1e-2).all():
        return "none is lower, as after a top-k, top-p or min-p; turn them off there"
    if mean(theirs - own, mask & first) <= tolerance:
        return (
            "those of first tokens agree, so it continues other tokens than it answers: let it "
            "answer the ids that it sampled instead of text that was tokenised again"
        )
    return (
        "it has other weights than the policy: check the model, reload=, and its numerics (raise "
        "tolerance= for a quantised one)"
    )


def _some(rollout: Rollout) -> Rollout:
    """A few rows, chosen without a look at them: a choice by length would bias the test."""
    rows = rollout.tokens.shape[0]
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, _ROWS)).round().astype(np.int32))
    return Rollout(
        **{
            name: getattr(rollout, name)[chosen]
            for name in ("tokens", "mask", "positions", "logprobs", "group", "truncated")
        }
    )


@eqx.filter_jit
def _scores(
    policy: Transformer, rollout: Rollout, temperatures: Float[Array, " temperature"]
) -> tuple[Float[Array, "temperature batch time"], Float[Array, "temperature batch time"]]:
    """Log-probs and entropies at several temperatures, from one run through the model."""
    hidden = policy(rollout.tokens, rollout.positions)
    before = jnp.take_along_axis(hidden, previous(rollout.positions)[:, :, None], axis=1)

    def one(temperature):
        return token_logprobs(
            before, policy.unembedding, rollout.tokens, temperature=temperature, mask=rollout.mask
        )

    return lax.map(one, temperatures)
