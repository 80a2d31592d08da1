"""Generalised advantage estimation."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import backward_sum


def gae(gamma: ScalarLike = 1.0, lam: ScalarLike = 0.95) -> Stateless:
    r"""Generalised advantage estimation with the critic's values at sampling time.

    $\delta_t = R_t + \gamma V_{t'} - V_t$ and $A_t = \delta_t + \gamma\lambda A_{t'}$, where $t'$
    is the row's next *masked* token: value and advantage are carried across gaps in the mask.
    After a row's last masked token both are 0, truncated rows included. Not whitened; value
    targets are `gae(...) | add_values()`. Unmasked positions get 0.

    Differs between libraries: verl, NeMo and AReaL carry as here; OpenRLHF treats a gap as value
    0 and decays through it (equal at `gamma = lam = 1`). verl's default `lam` is 1, TRL's 0.95.

    Args:
        gamma: discount per trained token, from 0 to 1.
        lam: 0 trusts the critic (one step), 1 the sampled return; from 0 to 1.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.values`.

    Source: Schulman et al. 2015 (arXiv:1506.02438).
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("lam", lam, least=0, most=1)
    return stateless(
        _gae,
        builder=gae,
        requires=("values",),
        reads_total=True,
        spreads=True,
        gamma=gamma,
        lam=lam,
    )


def _gae(signal: PerToken, rollout: Rollout, *, gamma: ScalarLike, lam: ScalarLike) -> PerToken:
    mask = rollout.mask
    zero, one = jnp.zeros((), signal.dtype), jnp.ones((), signal.dtype)
    values = zero_unmasked(rollout.need("values").astype(signal.dtype), mask)
    # The value at the next masked token is itself a recurrence: take it there, carry it elsewhere.
    upcoming = backward_sum(values, jnp.where(mask, zero, one))
    following = jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1)))
    delta = zero_unmasked(zero_unmasked(signal, mask) + gamma * following - values, mask)
    decay = jnp.where(mask, jnp.asarray(gamma * lam, signal.dtype), one)
    return zero_unmasked(backward_sum(delta, decay), mask)
