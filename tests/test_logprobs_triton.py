"""The GPU kernels, interpreted on CPU, against float64 written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_logprobs import ask, check, cotangents, inputs, oracle

from eqrl._logprobs.online import Row, merge, outcome
from eqrl._logprobs.pallas import triton
from eqrl._logprobs.pallas.triton import choose_splits, choose_tiles, pallas_triton


interpreted = functools.partial(pallas_triton, interpret=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_tokens_give_finite_values_and_no_gradient(dtype):
    hidden, head, targets = inputs(300, 32, 600, dtype)
    mask = np.zeros(300, bool)  # tiles without any token to train, a full one, and single ones
    mask[130:200] = mask[299] = True
    given = cotangents(300)
    got = ask(interpreted, hidden, head, targets, given, mask=jnp.asarray(mask))
    want = oracle(hidden, head, targets, given * mask, 1.0)
    assert all(np.isfinite(np.asarray(x.astype(jnp.float32))).all() for x in got)
    check([got[0][mask], got[1][mask], *got[2:]], [want[0][mask], want[1][mask], *want[2:]], dtype)
    np.testing.assert_array_equal(np.asarray(got[2].astype(jnp.float32))[~mask], 0)


def test_tiles_without_a_live_token_are_skipped(monkeypatch):
    hidden, head, targets = inputs(192, 32, 600)
    seen = []
    monkeypatch.setattr(
        triton, "merge", lambda parts, *rest: seen.append(parts) or merge(parts, *rest)
    )
    mask = jnp.arange(192) >= 70
    interpreted(hidden, head, targets, mask=mask)
    mass = np.asarray(seen[0].mass)
    assert (mass[:, :64] == 0).all(), "the first tile of 64 was computed"
    assert (mass.sum(axis=0)[64:] > 0).all(), "a tile with live tokens was skipped"


def test_a_dead_token_spreads_nothing():
    """Not even NaN, which a product with 0 would keep."""
    hidden, rows, targets = inputs(40, 32, 50)
    hidden = hidden.at[3].set(jnp.nan)
    live = (jnp.arange(40) != 3)[:, None]
    columns, inverse = jnp.array([0, 50], jnp.int32), jnp.float32(1)
    kernels = triton._kernels(True)
    seen = kernels.absorb(hidden, rows, targets[:, None], columns, live, inverse, None, None)
    assert all(np.isfinite(np.asarray(x)).all() for x in outcome(seen, inverse))
    ones = jnp.ones((40, 1))
    row = Row(seen.maximum, outcome(seen, inverse)[2], outcome(seen, inverse)[1], ones, ones)
    of_product = kernels.differentiate(
        hidden, rows, targets[:, None], columns, live, inverse, None, row
    )
    assert np.isfinite(np.asarray(of_product)).all()
    np.testing.assert_array_equal(np.asarray(of_product)[3], 0)


def test_equal_arguments_find_the_compiled_program():
    assert triton._kernels(True) is triton._kernels(True)
    assert triton._kernels(True) != triton._kernels(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [16, 17, 100, 8192])
@pytest.mark.parametrize(("rows", "width"), [(16, 6), (300, 100), (4096, 896), (151_936, 8192)])
def test_tiles_are_powers_of_two_that_fit(tokens, rows, width, dtype):
    tiles = choose_tiles(tokens, rows, width, jnp.dtype(dtype), False)
    for size in (tiles.tokens, tiles.rows, tiles.chunk, tiles.warps):
        assert size & (size - 1) == 0
    assert 16 <= tiles.tokens <= tokens and 16 <= tiles.rows <= rows
    itemsize = jnp.dtype(dtype).itemsize
    stages = (tiles.tokens + tiles.rows) * tiles.chunk * itemsize * tiles.stages
    assert stages <= 200 * 2**10, "of the 227 KiB of shared memory"
    assert tiles.group * tiles.tokens * width * itemsize <= 2**25, "of the 50 MB of L2"
    # Neither 10 bits, which DEFAULT means for float32, nor no tensor cores.
    exact = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    assert (tiles.algorithm == exact) == (dtype == "float32")


@pytest.mark.parametrize("token_tiles", [1, 5, 64, 256, 512])
def test_splits_keep_every_processor_busy(token_tiles):
    row_tiles = -(-151_936 // 256)
    splits = choose_splits(token_tiles, row_tiles)
    waves = -(-token_tiles * splits // 132)
    slowest = waves * -(-row_tiles // splits)
    ideal = token_tiles * row_tiles / 132
    assert slowest <= max(1.1 * ideal, ideal + 1)
    if token_tiles >= 64:
        assert token_tiles * splits >= 2 * 132
