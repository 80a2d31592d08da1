"""The plainest baseline: the mean score of the batch."""

from .._masked import live_rows, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout
from ._statistics import centre


def batch_center() -> Stateless:
    r"""Score minus the batch mean.

    $A_i = r_i - \bar r$ on every masked token of row $i$; the population is the live rows of the
    whole batch, each counted once whatever its length, row $i$ included (which shrinks the
    expected gradient by $(n-1)/n$ and biases nothing else). A constant batch gives exactly 0,
    and so does a batch of one live row. Empty rows get 0.

    Returns:
        A transform from rewards to advantages.

    Source: Williams 1992, the "reinforcement baseline", with the batch mean for the baseline.
    """
    return stateless(_batch_center, builder=batch_center, reads_total=True, spreads=True)


def _batch_center(signal: PerToken, rollout: Rollout) -> PerToken:
    mask = rollout.mask
    centred, _ = centre(row_total(signal, mask), live_rows(mask))
    return spread(centred, mask)
