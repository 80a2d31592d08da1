"""Standardise the signal over tokens."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre, variance


def whiten(*, ddof: ScalarLike = 1, eps: ScalarLike = 1e-8) -> Stateless:
    r"""Zero mean and unit variance over the trained tokens of the whole batch.

    $(x_t - \bar x) / \sqrt{s^2 + eps}$; the population is every masked token of the batch, so long
    completions weigh more than short ones; `eps` stands inside the root. A constant signal and a
    single token give exactly 0. Unmasked positions get 0.

    Differs between libraries: verl, slime and TRL divide the squares by n - 1 as here; OpenRLHF
    and NeMo by n, with the variance clamped at 1e-8; AReaL adds 1e-5 outside the root; TRL's PPO
    whitens per process.

    Args:
        ddof: 1 divides the squares by n - 1, 0 by n.
        eps: added to the variance, not negative.

    Returns:
        A transform of any per-token signal; nothing that reads totals may follow it.
    """
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    return stateless(_whiten, builder=whiten, spreads=True, ddof=ddof, eps=eps)


def _whiten(signal: PerToken, rollout: Rollout, *, ddof: ScalarLike, eps: ScalarLike) -> PerToken:
    mask = rollout.mask
    flat, count = centre(signal.ravel(), mask.ravel())
    power = variance(jnp.sum(flat**2), count, ddof)
    varies = power > 0
    scale = jnp.where(varies, lax.rsqrt(jnp.where(varies, power, 1) + eps), 0 * power)
    return zero_unmasked((flat * scale).reshape(mask.shape), mask)
