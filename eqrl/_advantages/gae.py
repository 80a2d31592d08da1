"""Generalised advantage estimation."""

from .._checks import check_choice, check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import GAPS, advantage_sum, steps_of


def gae(gamma: ScalarLike = 1.0, lam: ScalarLike = 0.95, *, gap: str = "carry") -> Stateless:
    r"""Generalised advantage estimation with the critic's values at sampling time.

    $\delta_t = R_t + \gamma V_{t'} - V_t$ and $A_t = \delta_t + \gamma\lambda A_{t'}$. With
    `gap="carry"` $t'$ is the row's next *masked* token: value and advantage are carried across
    gaps in the mask (tool output). With `gap="decay"` $t'$ is the next token of the sequence,
    masked or not; tokens in a gap have reward and value 0, so a gap of $n$ tokens looks like a
    state of value 0 and what lies behind it is worth $(\gamma\lambda)^n$ times as much. Both are
    the same without gaps, and at $\gamma = \lambda = 1$. Padding is never stepped on.

    After a row's last masked token value and advantage are 0, truncated rows included. Not
    whitened; value targets are `gae(...) | add_values()`, with a `lam` of their own if you like.
    Unmasked positions get 0, and so do empty rows.

    Differs between libraries: verl, NeMo and AReaL carry; OpenRLHF decays. verl's default `lam`
    is 1, TRL's 0.95. AReaL bootstraps truncated rows with the value of their last token.

    Args:
        gamma: discount per step, from 0 to 1.
        lam: 0 trusts the critic (one step), 1 the sampled return; from 0 to 1.
        gap: `"carry"` or `"decay"`.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.values`.

    Source: Schulman et al. 2015 (arXiv:1506.02438).
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("lam", lam, least=0, most=1)
    check_choice("gap", gap, GAPS)
    return stateless(
        _gae,
        builder=gae,
        requires=("values",),
        reads_total=True,
        spreads=True,
        gamma=gamma,
        lam=lam,
        gap=gap,
    )


def _gae(
    signal: PerToken, rollout: Rollout, *, gamma: ScalarLike, lam: ScalarLike, gap: str
) -> PerToken:
    mask = rollout.mask
    values = zero_unmasked(rollout.need("values").astype(signal.dtype), mask)
    reward = zero_unmasked(signal, mask)
    return zero_unmasked(advantage_sum(reward, values, steps_of(rollout, gap), gamma, lam), mask)
