"""One number a sample from its raw components."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def weighted(
    components: Float32[np.ndarray, "batch component"], weights: Sequence[int | float]
) -> Float32[np.ndarray, " batch"]:
    """The weighted sum of the components of each sample.

    Args:
        components: raw components, one column a function (`Scored.components`).
        weights: one finite number a function; zero and negative ones are legal.

    Returns:
        `sum_c weights[c] * components[:, c]`, added up in float64.

    Raises:
        ValueError: if there is not exactly one finite weight a column.
    """
    if components.ndim != 2 or components.shape[1] != len(weights):
        raise ValueError(
            f"{len(weights)} `weights` for components of shape {components.shape}; give one "
            "weight a reward function"
        )
    factors = np.asarray(weights, np.float64)
    if not np.all(np.isfinite(factors)):
        raise ValueError(f"`weights` are {list(weights)}; give finite numbers")
    return np.sum(components.astype(np.float64) * factors, axis=1).astype(np.float32)
