"""Turn advantages back into value targets."""

from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout


def add_values() -> Stateless:
    r"""The signal plus the critic's values at sampling time: $G_t = A_t + V_t$.

    `gae(...) | add_values()` gives the targets of the value loss. Take them from advantages that
    were not whitened. Unmasked positions get 0.

    Returns:
        A transform from advantages to value targets; requires `rollout.values`.
    """
    return stateless(_add_values, builder=add_values, requires=("values",), spreads=True)


def _add_values(signal: PerToken, rollout: Rollout) -> PerToken:
    return zero_unmasked(signal + rollout.need("values").astype(signal.dtype), rollout.mask)
