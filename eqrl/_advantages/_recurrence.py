"""Linear recurrences that run backwards over time, in parallel."""

import jax
from jax import lax

from .._types import PerToken


@jax.jit  # Outside `jit` the scan would run as some forty separate programs.
def backward_sum(x: PerToken, decay: PerToken) -> PerToken:
    """`y[t] = x[t] + decay[t] * y[t + 1]`, with 0 after the last column.

    An associative scan: logarithmic depth in time. Where `x` is 0 and `decay` is 1 the running
    value is carried over unchanged, which is how gaps in a mask are skipped.
    """

    def join(later, earlier):
        later_decay, later_sum = later
        decay, total = earlier
        return later_decay * decay, total + decay * later_sum

    return lax.associative_scan(join, (decay, x), reverse=True, axis=1)[1]
