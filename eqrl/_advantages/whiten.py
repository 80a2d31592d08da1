"""Standardise the signal over tokens."""

import jax.numpy as jnp
from jax import lax

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre, variance


STABILISERS = ("inside", "outside", "clamp")


def whiten(
    *, ddof: ScalarLike = 1, eps: ScalarLike = 1e-8, stabiliser: str = "inside"
) -> Stateless:
    r"""Zero mean and unit variance over the trained tokens of the whole batch.

    $(x_t - \bar x) / d$; the population is every masked token of the batch, so long completions
    weigh more than short ones. `stabiliser` says where `eps` stands in $d$:

    - `"inside"` the root: $d = \sqrt{s^2 + eps}$;
    - `"outside"` of it: $d = s + eps$;
    - `"clamp"`: $d = \sqrt{\max(s^2, eps)}$, untouched unless the signal hardly varies.

    A constant signal and a single token give exactly 0. Unmasked positions get 0.

    Differs between libraries: verl, slime and TRL are the default here. OpenRLHF and NeMo are
    `whiten(ddof=0, stabiliser="clamp")`, AReaL `whiten(eps=1e-5, stabiliser="outside")`; TRL's
    PPO whitens per process.

    Args:
        ddof: 1 divides the squares by n - 1, 0 by n.
        eps: keeps the divisor from 0, not negative.
        stabiliser: `"inside"`, `"outside"` or `"clamp"`.

    Returns:
        A transform of any per-token signal; nothing that reads totals may follow it.
    """
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, least=0)
    check_choice("stabiliser", stabiliser, STABILISERS)
    return stateless(
        _whiten, builder=whiten, spreads=True, ddof=ddof, eps=eps, stabiliser=stabiliser
    )


def _whiten(
    signal: PerToken, rollout: Rollout, *, ddof: ScalarLike, eps: ScalarLike, stabiliser: str
) -> PerToken:
    mask = rollout.mask
    flat, count = centre(signal.ravel(), mask.ravel())
    power = variance(jnp.sum(flat**2), count, ddof)
    varies = power > 0
    safe = jnp.where(varies, power, 1)
    match stabiliser:
        case "inside":
            scale = lax.rsqrt(safe + eps)
        case "outside":
            scale = 1 / (jnp.sqrt(safe) + eps)
        case _:
            scale = lax.rsqrt(jnp.maximum(safe, eps))
    scale = jnp.where(varies, scale, 0 * power)
    return zero_unmasked((flat * scale).reshape(mask.shape), mask)
