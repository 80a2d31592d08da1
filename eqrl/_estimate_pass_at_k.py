"""pass@k without bias."""

import numpy as np
from jaxtyping import Shaped


def estimate_pass_at_k(correct: Shaped[np.ndarray, "problem sample"], k: int) -> float:
    r"""Probability that at least one of k samples is correct, averaged over problems.

    $1 - \binom{n-c}{k} / \binom{n}{k}$ for a problem with c of n samples correct: the unbiased
    estimate from n >= k samples (Chen et al. 2021, arXiv:2107.03374).

    Args:
        correct: 0/1 or bool.
        k: at most the number of samples.

    Raises:
        ValueError: if k is not between 1 and the number of samples.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the {samples} samples a problem has")
    wrong = samples - correct.astype(int).sum(axis=1)
    # All k drawn from the wrong ones: prod (wrong - i) / (samples - i).
    index = np.arange(k)
    chances = np.clip(wrong[:, None] - index, 0, None) / (samples - index)
    return float(np.mean(1 - np.prod(chances, axis=1)))
