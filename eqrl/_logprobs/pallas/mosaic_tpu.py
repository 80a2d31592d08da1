r"""Matrix product and softmax in one TPU kernel: logits live and die in VMEM.

Two kernels over one grid: token tiles x vocabulary tiles x pieces of the width. The first keeps the
online softmax of its tokens in VMEM while the vocabulary passes; the second turns one slice of the
logits into the loss's derivative by them. Bodies come first, launches after them.

With N tokens, V entries, width d and tiles of n tokens, a product is 2 N V d FLOPs. A tile's hidden
states stay in VMEM while the vocabulary passes, so the unembedding is read N / n times, n FLOPs a
byte in bfloat16; a chip needs 224 (v4), 240 (v5e), 166 (v5p), 560 (v6e) to be busy. `choose_tiles`
therefore takes 1,024 tokens where VMEM allows it. A width too large for that is cut into pieces;
then hidden states pass again for each tile of v entries, and n v / (n + v) must exceed the ridge.
Blocks are double-buffered by Pallas. A token brings 32 bytes besides its hidden state, and takes 32
bytes of results, in arrays `[8, token]`: as `[token, 1]` each number would fill 512 bytes of HBM.

In a body, softmax arithmetic of strips of tokens shares a basic block with the matrix product, so
that the compiler fills the slots beside the matrix unit with it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from ..._types import ScalarLike
from ..layout import Layout
from ..online import Row, Seen, absorb, differentiate, nothing, squash
from ..streamed import Kernels, streamed


# Tokens a matrix product in a body, which bounds the size of the program, and tokens whose logits
# are turned over at once, which bounds the registers.
_GROUP, _STRIP = 256, 64


# --- bodies: what happens to one tile ---------------------------------------------------------


class Scalars(NamedTuple):
    """What a kernel knows before its first block arrives.

    Attributes:
        alive: of each token tile, whether any of its tokens is live.
        busy: of each group of tokens, likewise.
        columns: first row of the unembedding that counts, and one past the last.
        inverse: 1 / temperature.
    """

    alive: jax.Array
    busy: jax.Array
    columns: jax.Array
    inverse: jax.Array


def _absorb_body(
    alive, busy, columns, inverse, hidden, rows, token, out, own, product, *state, width, soft_cap
):
    """Adds the tile's columns to the tokens' statistics, and writes these after the last tile."""
    tile, last = pl.program_id(1), pl.num_programs(1) - 1
    scalars = Scalars(alive, busy, columns, inverse)

    def start(group):
        own[group, :] = token[:, group].T
        for ref, value in zip(state, nothing(group.size, jnp.float32), strict=True):
            ref[group, :] = value

    def finish(strip):
        x, counts, hit = _logits(product[strip, :], tile, scalars, own[strip, 0:1], soft_cap)
        seen = absorb(Seen(*(ref[strip, :] for ref in state)), x, counts, hit, inverse[0])
        for ref, value in zip(state, seen, strict=True):
            ref[strip, :] = value

    def close(group, works):
        @pl.when(works & (tile == last))
        def _():
            out[:, group] = _as_lanes(*(ref[group, :] for ref in state))

        @pl.when(~works & (tile == last))
        def _():
            # A mass of 1 on a logit of 0: log-prob and entropy 0, where nothing was computed.
            is_mass = lax.broadcasted_iota(jnp.int32, (8, group.size), 0) == 1
            out[:, group] = jnp.where(is_mass, 1.0, 0.0)

    _sweep(scalars, hidden, rows, product, width, start, finish, close)


def _differentiate_body(
    alive, busy, columns, inverse, hidden, rows, token, out, own, product, *, width, soft_cap
):
    """Writes the derivative by the tile's products, and zeros where no token is live."""
    tile = pl.program_id(1)
    scalars = Scalars(alive, busy, columns, inverse)

    def start(group):
        own[group, :] = token[:, group].T

    def finish(strip):
        target, live, *row = (own[strip, i : i + 1] for i in range(7))
        x, counts, hit = _logits(product[strip, :], tile, scalars, target, soft_cap)
        result = differentiate(x, counts & (live > 0), hit, Row(*row), inverse[0], soft_cap)
        out[strip, :] = result.astype(out.dtype)

    def close(group, works):
        @pl.when(~works)
        def _():
            out[group, :] = jnp.zeros((group.size, out.shape[1]), out.dtype)

    _sweep(scalars, hidden, rows, product, width, start, finish, close)


def _sweep(scalars, hidden, rows, product, width, start, finish, close):
    """Multiplies group by group of the tile's tokens, and hands on what is complete.

    Args:
        scalars: see there.
        hidden: `[token, piece]`.
        rows: `[row, piece]`.
        product: scratch `[token, row]`.
        width: of all pieces.
        start: called with the group's tokens before the first tile of a vocabulary.
        finish: called with strips of tokens whose products are complete.
        close: called with the group's tokens, and whether they are busy, after the last piece.
    """
    tokens, size = hidden.shape
    length = min(_GROUP, tokens)
    first_group = pl.program_id(0) * (tokens // length)
    piece, last = pl.program_id(2), pl.num_programs(2) - 1
    is_first = (pl.program_id(1) == 0) & (piece == 0)

    def step(i, carry):
        group = pl.ds(pl.multiple_of(i * length, length), length)
        works = scalars.busy[first_group + i] != 0
        pl.when(works & is_first)(lambda: start(group))

        def add():
            part = _multiply(hidden[group, :], rows[...], piece * size, width)
            if width > size:
                part += jnp.where(piece == 0, 0.0, product[group, :])
            product[group, :] = part

        if width > size:
            pl.when(works & (piece < last))(add)

        @pl.when(works & (piece == last))
        def _():
            add()
            for at in range(0, length, _STRIP):
                finish(pl.ds(pl.multiple_of(i * length + at, _STRIP), _STRIP))

        pl.when(piece == last)(lambda: close(group, works))
        return carry

    lax.fori_loop(0, tokens // length, step, 0)


def _multiply(a, b, start, width):
    """`a @ b.T` of one piece of the width, which begins at `start`."""
    size = a.shape[1]
    if width % size:
        # Beyond the width lies anything, in both, and 0 * NaN is NaN.
        inside = start + lax.broadcasted_iota(jnp.int32, (1, size), 1) < width
        a, b = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (a, b))
    # The matrix unit multiplies bfloat16; it takes six passes to be exact for float32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _logits(product, tile, scalars, target, soft_cap):
    """The tile's logits before the temperature, which columns count, and where the targets are."""
    size = product.shape[1]
    index = tile * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
    counts = (scalars.columns[0] <= index) & (index < scalars.columns[1])
    hit = index == pltpu.bitcast(target, jnp.int32)
    return squash(product, soft_cap), counts, hit


def _as_lanes(*columns):
    """Columns `[token, 1]` as the first rows of `[8, token]`."""
    lane = lax.broadcasted_iota(jnp.int32, (1, 128), 1)
    side_by_side = jnp.zeros((columns[0].shape[0], 128), jnp.float32)
    for i, x in enumerate(columns):
        side_by_side = jnp.where(lane == i, x, side_by_side)
    return side_by_side.T[:8, :]


# --- launches: grids, blocks, and what a token brings along -----------------------------------


class Tiles(NamedTuple):
    """Sizes of a block in VMEM.

    Attributes:
        tokens: 128, or a multiple of 256.
        rows: of the unembedding, a multiple of 128.
        width: the whole width, or a multiple of 128.
        memory: bytes of VMEM that the compiler may use.
    """

    tokens: int
    rows: int
    width: int
    memory: int = 48 << 20


def choose_tiles(tokens: int, rows: int, width: int, bytes_each: int) -> Tiles:
    """Block sizes for the chip that is traced for, or for any if that is not known.

    A v4 has 16 MiB of VMEM a core, chips after it 64 MiB or more. A tile's hidden states take up to
    16 MiB of that (2 MiB on v4), twice, since the next ones are loaded meanwhile.
    """
    small = not pltpu.is_tpu_device() or pltpu.get_tpu_info().vmem_capacity_bytes <= 16 << 20
    most = 512 if small else 1024
    tokens = max(tokens, 1)
    # float32 blocks are kept as three bfloat16 ones besides.
    pieces = pl.cdiv(width * bytes_each, 4096 if small else 32768 // bytes_each)
    piece = width if pieces == 1 else _up(pl.cdiv(width, pieces), 128)
    wide = piece * bytes_each > 8192
    balanced = pl.cdiv(tokens, pl.cdiv(tokens, most))
    return Tiles(
        128 if tokens <= 128 else _up(balanced, _GROUP),
        min(256 if wide else 512, _up(rows, 128)),
        piece,
        (16 if small else 48) << 20,
    )


def _up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _launch(how, body, result, hidden, rows, columns, live, inverse, per_token, scratch, soft_cap):
    """Runs `body` over the grid.

    Args:
        how: `Launch`.
        body: one of the two above.
        result: the output's shape, block, and place of the block, from the tiles.
        hidden: `[token, width]`.
        rows: `[row, width]`.
        columns: see `Scalars`.
        live: `[token, 1]`.
        inverse: see `Scalars`.
        per_token: arrays `[token, 1]`, the targets first.
        scratch: how many arrays `[token, 1]` a tile keeps.
        soft_cap: see `token_logprobs`.
    """
    (tokens, width), vocab = hidden.shape, rows.shape[0]
    tile = how.tiles or choose_tiles(tokens, vocab, width, hidden.dtype.itemsize)
    counts = pl.cdiv(tokens, tile.tokens), pl.cdiv(vocab, tile.rows), pl.cdiv(width, tile.width)
    room = counts[0] * tile.tokens
    busy = jnp.pad(live[:, 0], (0, room - tokens)).reshape(-1, min(_GROUP, tile.tokens)).any(1)
    alive = busy.reshape(counts[0], -1).any(1)

    # Blocks of tiles in which nothing happens are those of their neighbours, and not loaded again.
    def hidden_at(n, v, k, alive, *_):
        return n, jnp.where(alive[n] != 0, k, 0)

    def rows_at(n, v, k, alive, *_):
        return jnp.where(alive[n] != 0, v, 0), jnp.where(alive[n] != 0, k, 0)

    shape, block, place = result(tile, room)
    return pl.pallas_call(
        functools.partial(body, width=width, soft_cap=soft_cap),
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=counts,
            in_specs=[
                pl.BlockSpec((tile.tokens, tile.width), hidden_at),
                pl.BlockSpec((tile.rows, tile.width), rows_at),
                pl.BlockSpec((8, tile.tokens), lambda n, *_: (0, n)),
            ],
            out_specs=pl.BlockSpec(block, place),
            scratch_shapes=[
                pltpu.VMEM((tile.tokens, last), jnp.float32)
                for last in (8, tile.rows, *[1] * scratch)
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.memory,
        ),
        interpret=how.interpret,
    )(
        alive.astype(jnp.int32),
        busy.astype(jnp.int32),
        columns,
        inverse[None],
        hidden,
        rows,
        _packed(per_token, room),
    )


def _packed(per_token, room: int) -> Float[Array, "8 room"]:
    """Numbers of each token as rows of one array; integers by their bits."""
    bits = [
        lax.bitcast_convert_type(x, jnp.float32) if x.dtype == jnp.int32 else x.astype(jnp.float32)
        for x in per_token
    ]
    packed = jnp.concatenate(bits, axis=1).T
    return jnp.pad(packed, [(0, 8 - len(bits)), (0, room - packed.shape[1])])


class Launch(NamedTuple):
    """What is fixed when kernels are compiled."""

    tiles: Tiles | None
    interpret: bool | pltpu.InterpretParams


def _absorb(how, hidden, unembedding, targets, columns, live, inverse, soft_cap, size) -> Seen:
    del size  # tiles are smaller, and chosen by what fits into VMEM

    def result(tile, room):
        return jax.ShapeDtypeStruct((8, room), jnp.float32), (8, tile.tokens), lambda n, *_: (0, n)

    arrays = hidden, unembedding, columns, live, inverse, [targets]
    packed = _launch(how, _absorb_body, result, *arrays, 4, soft_cap)
    return Seen(*(packed[i, : hidden.shape[0], None] for i in range(4)))


def _differentiate(how, hidden, rows, targets, columns, live, inverse, soft_cap, row):
    def result(tile, room):
        shape = jax.ShapeDtypeStruct((hidden.shape[0], rows.shape[0]), hidden.dtype)
        return shape, (tile.tokens, tile.rows), lambda n, v, *_: (n, v)

    arrays = hidden, rows, columns, live, inverse, [targets, live, *row]
    return _launch(how, _differentiate_body, result, *arrays, 0, soft_cap)


@functools.cache
def _kernels(how: Launch) -> Kernels:
    """The same object for the same launch, so that programs are compiled once."""
    return Kernels(functools.partial(_absorb, how), functools.partial(_differentiate, how))


def pallas_tpu(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, " token"] | None = None,
    size: int | None = None,
    layout: Layout | None = None,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. Holds `[token, size]` arrays in the backward pass only.

    Args:
        size: vocabulary entries a slice of the backward pass; see `chunked`.
        layout: of tokens and vocabulary on a mesh.
        tiles: block sizes of the kernels; see `choose_tiles`.
        interpret: runs the kernels without a TPU, slowly, for tests.

    Raises:
        ValueError: if `hidden` and `unembedding` are not both float32 or both bfloat16.
    """
    dtypes = {str(hidden.dtype), str(unembedding.dtype)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise ValueError(
            f"hidden is {hidden.dtype} and unembedding {unembedding.dtype}, and the TPU kernels "
            "take both as float32 or both as bfloat16; cast them, or use 'chunked'"
        )
    return streamed(
        _kernels(Launch(tiles, interpret)),
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        soft_cap=soft_cap,
        mask=mask,
        size=size,
        layout=layout,
    )
