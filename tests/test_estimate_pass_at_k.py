"""pass@k against counting all subsets."""

import itertools

import numpy as np
import pytest

from eqrl._estimate_pass_at_k import estimate_pass_at_k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_equals_counting_every_subset(k):
    correct = np.random.default_rng(0).random((6, 5)) < 0.3
    counted = [
        np.mean([row[list(chosen)].any() for chosen in itertools.combinations(range(5), k)])
        for row in correct
    ]
    np.testing.assert_allclose(estimate_pass_at_k(correct, k), np.mean(counted), rtol=1e-12)


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="k=6"):
        estimate_pass_at_k(np.ones((2, 5)), 6)
