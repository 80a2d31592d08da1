"""The TPU kernels, interpreted on CPU, against float64 written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from oracles_logprobs import ask, check, cotangents, inputs, oracle

from eqrl._logprobs.online import Row, outcome
from eqrl._logprobs.pallas import mosaic_tpu
from eqrl._logprobs.pallas.mosaic_tpu import Launch, Tiles, choose_tiles, pallas_tpu


interpreted = functools.partial(pallas_tpu, interpret=True)
# Small enough that small arrays have several tiles of tokens, rows and pieces of the width.
SMALL = Tiles(128, 128, 128)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "temperature", "soft_cap", "tiles"),
    [
        (131, 100, 1_000, 0.8, 5.0, SMALL._replace(width=100)),
        (301, 96, 700, 0.8, None, Tiles(256, 256, 96)),
        (150, 576, 300, 1.0, 30.0, SMALL),
        (515, 24, 131, 1.0, None, Tiles(512, 128, 24)),
    ],
)
def test_several_tiles_groups_and_pieces(tokens, width, vocab, temperature, soft_cap, tiles, dtype):
    arguments = *inputs(tokens, width, vocab, dtype), cotangents(tokens)
    options = {"temperature": temperature, "soft_cap": soft_cap}
    got = ask(interpreted, *arguments, tiles=tiles, **options)
    check(got, oracle(*arguments, temperature, soft_cap), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [SMALL, Tiles(512, 128, 32)])
def test_masked_tokens_give_finite_values_and_no_gradient(tiles, dtype):
    """Tiles and groups in a tile with no token to compute, full ones, and mixed ones."""
    hidden, head, targets = inputs(900, 32, 300, dtype)
    mask = np.zeros(900, bool)
    mask[130:200] = mask[512:768] = mask[899] = True
    given = cotangents(900)
    got = ask(interpreted, hidden, head, targets, given, mask=jnp.asarray(mask), tiles=tiles)
    want = oracle(hidden, head, targets, given * mask, 1.0)
    assert all(np.isfinite(np.asarray(x.astype(jnp.float32))).all() for x in got)
    check([got[0][mask], got[1][mask], *got[2:]], [want[0][mask], want[1][mask], *want[2:]], dtype)
    np.testing.assert_array_equal(np.asarray(got[2].astype(jnp.float32))[~mask], 0)


def _given(hidden, rows, row_targets, live, columns=None):
    columns = (0, rows.shape[0]) if columns is None else columns
    return (
        jnp.asarray(row_targets, jnp.int32)[:, None],
        jnp.asarray(columns, jnp.int32),
        jnp.asarray(live)[:, None],
        jnp.float32(0.5),
        None,
    )


@pytest.mark.parametrize("length", [128, 256])
def test_tokens_that_are_not_live_are_skipped_and_spread_nothing(length):
    """Of a tile or group with no live token, not even NaN is read."""
    tokens, dead = 512, slice(0, length)
    hidden, rows, targets = inputs(tokens, 32, 300)
    hidden = hidden.at[dead].set(jnp.nan).at[300].set(jnp.nan)
    live = np.ones(tokens, bool)
    live[dead] = live[300] = False
    given = _given(hidden, rows, targets, live)
    kernels = mosaic_tpu._kernels(Launch(Tiles(128 if length == 128 else 512, 128, 32), True))
    seen = kernels.absorb(hidden, rows, *given, None)
    np.testing.assert_array_equal(np.asarray(seen.mass)[dead], 1)
    np.testing.assert_array_equal(np.asarray(outcome(seen, jnp.float32(0.5))[0])[dead], 0)
    assert np.isfinite(np.asarray(outcome(seen, jnp.float32(0.5))[1])[live]).all()
    assert (np.asarray(seen.mass)[live] != 1).all(), "tokens that are live were skipped"
    logprob, entropy, log_mass = outcome(seen, jnp.float32(0.5))
    ones = jnp.ones_like(logprob)
    row = Row(seen.maximum, log_mass, entropy, ones, ones)
    of_product = np.asarray(kernels.differentiate(hidden, rows, *given, row))
    np.testing.assert_array_equal(of_product[~live], 0)
    assert np.isfinite(of_product).all() and (np.abs(of_product[live]).sum(axis=1) > 0).all()


@pytest.mark.parametrize("pieces", [1, 2])
def test_no_race_and_nothing_read_before_it_is_written(pieces):
    """On a simulated TPU: memory full of NaN, tiles in random order, copies as late as allowed."""
    simulated = pltpu.InterpretParams(
        random_seed=0,
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="uninitialized",
    )
    hidden, head, targets = inputs(300, 200, 301)
    mask = np.ones(300, bool)
    mask[128:256] = False
    given = cotangents(300)
    options = {"tiles": Tiles(128, 128, 128 if pieces == 2 else 200), "size": 160}
    try:
        got = ask(
            pallas_tpu, hidden, head, targets, given, mask=jnp.asarray(mask), interpret=simulated,
            **options,
        )  # fmt: skip
        jax.block_until_ready(got)
        races = interpret_pallas_call.races
        assert races is not None and not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    want = oracle(hidden, head, targets, given * mask, 1.0)
    check(
        [got[0][mask], got[1][mask], *got[2:]], [want[0][mask], want[1][mask], *want[2:]], "float32"
    )


def test_equal_arguments_find_the_compiled_program():
    assert mosaic_tpu._kernels(Launch(None, True)) is mosaic_tpu._kernels(Launch(None, True))
    assert mosaic_tpu._kernels(Launch(None, True)) != mosaic_tpu._kernels(Launch(None, False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 128, 129, 1_100, 8_192])
@pytest.mark.parametrize("width", [6, 896, 8_100, 16_384])
def test_tiles_are_aligned_and_fit(tokens, width, dtype):
    tiles = choose_tiles(tokens, 151_936, width, jnp.dtype(dtype).itemsize)
    assert tiles.tokens == 128 or tiles.tokens % 256 == 0
    assert tiles.width == width or tiles.width % 128 == 0
    assert tiles.rows % 128 == 0
    blocks = (tiles.tokens + tiles.rows) * tiles.width * jnp.dtype(dtype).itemsize * 2
    assert blocks + 2 * tiles.tokens * tiles.rows * 4 <= tiles.memory
    waste = -tokens % tiles.tokens
    assert waste < 256 * -(-tokens // tiles.tokens)
