"""Generalised advantage estimation over the turns of a conversation."""

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import advantage_sum
from ._turns import over_turn, turn_starts, turn_total


def turn_gae(gamma: ScalarLike = 1.0, lam: ScalarLike = 0.95) -> Stateless:
    r"""GAE with a whole turn as one step; each token of the turn gets the turn's advantage.

    A turn is a maximal run of consecutive masked tokens. With $R_k$ the sum of the rewards on the
    tokens of turn $k$ and $V_k$ the critic's value at its *first* token (the state in which the
    turn was begun), $\delta_k = R_k + \gamma V_{k+1} - V_k$ and
    $A_k = \delta_k + \gamma\lambda A_{k+1}$. After the last turn both are 0, truncated rows
    included. A row of one turn gets its total minus its first value. Not whitened. Unmasked
    positions and empty rows get 0.

    At `lam=1` $A_k + V_k$ is `turn_returns(gamma)`, which is the value target to go with it;
    `| add_values()` would add every token's own value instead of the turn's.

    Differs between libraries: AReaL computes this from explicit turn ids (two turns may touch) and
    bootstraps truncated rows with the value of their last token; VAGEN trains the critic on first
    tokens only.

    Args:
        gamma: discount per turn, from 0 to 1.
        lam: 0 trusts the critic (one turn), 1 the sampled return; from 0 to 1.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.values`.

    Source: Schulman et al. 2015 (arXiv:1506.02438); turns as steps: Zeng et al. 2025
    (arXiv:2505.11821).
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("lam", lam, least=0, most=1)
    return stateless(
        _turn_gae,
        builder=turn_gae,
        requires=("values",),
        reads_total=True,
        spreads=True,
        gamma=gamma,
        lam=lam,
    )


def _turn_gae(
    signal: PerToken, rollout: Rollout, *, gamma: ScalarLike, lam: ScalarLike
) -> PerToken:
    mask = rollout.mask
    starts = turn_starts(mask)
    values = zero_unmasked(rollout.need("values").astype(signal.dtype), starts)
    advantage = advantage_sum(turn_total(signal, mask), values, starts, gamma, lam)
    return over_turn(advantage, mask)
