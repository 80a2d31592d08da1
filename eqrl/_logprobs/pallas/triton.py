r"""Pallas kernels for NVIDIA GPUs, compiled by Triton.

Both kernels are one matrix product with an epilogue. A `[128, 256]` tile of logits does 85 FLOP
per byte that it reads, through L2; its float32 sums fill half of the registers of 8 warps, and the
epilogue leaves next to none to spill (20 bytes a thread). Operands arrive in chunks of 64 along
the width, so shared memory does not grow with the width: 48 KiB a stage, 4 stages in flight, of
227 KiB. The epilogue is some 25 instructions a logit, against `width / 16` for the product: the
narrower the model, the more it weighs.

- `absorb` reads the unembedding and writes 16 bytes a token and split. For n tokens, V entries of
  width d it does 2 n V d FLOP; from HBM it reads the unembedding once per group of token tiles
  (`_group`), 2 V d bytes in bfloat16. With groups of 16 tiles of 128 tokens these are 2,048 FLOP
  per byte; H100's ridge is 989 TFLOP/s / 3.35 TB/s = 295.
- `differentiate` writes one slice `[n, size]` besides: 2 n bytes a row of 2 n d FLOP, thus d FLOP
  per byte.

Everything may be ragged. The last tile of tokens and of rows is moved back to end at the edge, so
that all tiles have one shape and no load needs a mask; entries seen twice count once (`absorb`),
or are written twice with the same value (`differentiate`, and tokens).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltri
from jaxtyping import Array, Bool, Float, Int

from ..._types import ScalarLike
from ..layout import Layout
from ..online import Row, Seen, absorb, differentiate, merge, nothing, squash
from ..streamed import Kernels, streamed


# Streaming multiprocessors of an H100 or H200. On another chip only the last wave is less full.
_PROCESSORS = 132
# Smallest side of a tile that a tensor core multiplies.
_SMALLEST = 16


def pallas_triton(
    hidden: Float[Array, "token width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " token"],
    *,
    temperature: ScalarLike = 1.0,
    soft_cap: float | None = None,
    mask: Bool[Array, " token"] | None = None,
    size: int | None = None,
    layout: Layout | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, " token"], Float[Array, " token"]]:
    """See `token_logprobs`. No logits outside a processor, but `[token, size]` in the backward.

    Args:
        hidden: float32 or bfloat16.
        unembedding: of `hidden`'s type.
        targets: token ids.
        temperature: see `token_logprobs`.
        soft_cap: see `token_logprobs`.
        mask: tiles of 128 tokens without a live one are skipped.
        size: vocabulary entries a slice of the backward pass; see `chunked`.
        layout: of tokens and vocabulary on a mesh.
        interpret: runs the kernels as plain JAX on any platform; for tests.

    Raises:
        ValueError: if the inputs are neither both float32 nor both bfloat16.
    """
    if hidden.dtype != unembedding.dtype or hidden.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"hidden is {hidden.dtype} and unembedding {unembedding.dtype}, but the kernels take "
            "both in float32 or both in bfloat16; cast them, or use implementation='chunked'"
        )
    return streamed(
        _kernels(interpret),
        hidden,
        unembedding,
        targets,
        temperature=temperature,
        soft_cap=soft_cap,
        mask=mask,
        size=size,
        layout=layout,
    )


@functools.cache
def _kernels(interpret: bool) -> Kernels:
    """The same objects for the same argument, so that jit finds what it has compiled."""
    return Kernels(
        functools.partial(_absorb, interpret=interpret),
        functools.partial(_differentiate, interpret=interpret),
    )


# ---- Sizes


class Tiles(NamedTuple):
    """What is fixed of a kernel when it is compiled, besides the arrays' shapes.

    Attributes:
        tokens: of a tile.
        rows: of the unembedding, of a tile.
        chunk: of the width that is in shared memory at a time.
        warps: of 32 threads, that share a tile.
        stages: chunks in flight.
        group: tiles of tokens whose programs run side by side.
        algorithm: of the product.
    """

    tokens: int
    rows: int
    chunk: int
    warps: int
    stages: int
    group: int
    algorithm: lax.DotAlgorithmPreset | lax.Precision


def choose_tiles(tokens: int, rows: int, width: int, dtype: jnp.dtype, interpret: bool) -> Tiles:
    """Tile sizes, all powers of 2.

    bfloat16: the largest tile of which the sums of 8 warps fit into registers. float32: each
    operand is split into parts of 10 bits that tensor cores multiply (three products for each),
    which takes more registers, hence a quarter of the tile.
    """
    narrow = dtype == jnp.bfloat16
    most_tokens, most_rows, most_chunk = (128, 256, 64) if narrow else (64, 128, 32)
    tile_tokens = min(most_tokens, _power_below(tokens))
    tile_rows = min(most_rows, _power_below(rows))
    # Chunks that divide the width need no mask.
    chunk = max(math.gcd(width, most_chunk), _SMALLEST)
    bits = jnp.finfo(dtype).bits
    return Tiles(
        tile_tokens,
        tile_rows,
        chunk,
        warps=8 if tile_tokens * tile_rows >= 2**15 else 4,
        stages=4 if narrow else 3,
        group=_group(tile_tokens * width * bits // 8),
        algorithm=_algorithm(narrow, interpret),
    )


def _algorithm(narrow: bool, interpret: bool):
    """Exact products of bfloat16; of float32, all but the last bits."""
    if narrow:
        return lax.Precision.DEFAULT
    # A plain float32 product would not use tensor cores, and DEFAULT would round to 10 bits. CPU
    # has no TF32.
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _group(tile_bytes: int) -> int:
    """Tiles of hidden states that take a third of the 50 MB of L2, so that they stay there."""
    return max(4, 2**24 // tile_bytes)


def _power_below(n: int) -> int:
    return 2 ** (n.bit_length() - 1)


def choose_splits(token_tiles: int, row_tiles: int) -> int:
    """How many programs share the vocabulary of one tile of tokens.

    As many as make the slowest processor's work least: programs come in waves of one a processor,
    each as long as its share of the vocabulary. The fewest among equals.
    """

    def work(splits: int) -> tuple[int, int]:
        waves = -(-token_tiles * splits // _PROCESSORS)
        return waves * -(-row_tiles // splits), splits

    return min(range(1, min(row_tiles, 2 * _PROCESSORS) + 1), key=work)


# ---- Kernel bodies: what one program does


def _place(tiles: Tiles, token_tiles: int, others: int):
    """Which tile of tokens, and which of `others`, this program works on.

    Programs start in the order of their numbers: all `others` of one group of token tiles, then
    the next group. So programs that run at a time share both operands through L2.
    """
    number = pl.program_id(0)
    first = number // (tiles.group * others) * tiles.group
    height = jnp.minimum(token_tiles - first, tiles.group)
    inside = number - first * others
    return first + inside % height, inside // height


def _start(tile, size: int, most: int):
    """Where a tile starts; the last one is moved back."""
    return jnp.minimum(tile * size, most - size)


def _product(tiles: Tiles, hidden_ref, rows_ref, token, row) -> Float[Array, "token row"]:
    """Hidden states times rows, one tile, in float32."""
    width = hidden_ref.shape[1]

    def operand(ref, start, size, chunk):
        where = ref.at[pl.ds(start, size), pl.ds(chunk * tiles.chunk, tiles.chunk)]
        if width % tiles.chunk == 0:
            return pltri.load(where)
        inside = chunk * tiles.chunk + jnp.arange(tiles.chunk, dtype=jnp.int32) < width
        inside = jnp.broadcast_to(inside[None, :], (size, tiles.chunk))
        return pltri.load(where, mask=inside, other=0)

    def step(chunk, total):
        a = operand(hidden_ref, token, tiles.tokens, chunk)
        b = operand(rows_ref, row, tiles.rows, chunk)
        return total + lax.dot_general(
            a,
            b,
            (((1,), (1,)), ((), ())),
            precision=tiles.algorithm,
            preferred_element_type=jnp.float32,
        )

    zero = jnp.zeros((tiles.tokens, tiles.rows), jnp.float32)
    return lax.fori_loop(np.int32(0), np.int32(-(-width // tiles.chunk)), step, zero)


def _columns(tiles: Tiles, row, columns_ref, targets):
    """Which columns of a tile that starts at `row` count, and where the targets are."""
    index = row + jnp.arange(tiles.rows, dtype=jnp.int32)[None, :]
    return (columns_ref[0] <= index) & (index < columns_ref[1]), index == targets


def _absorb_kernel(
    tiles: Tiles,
    splits: int,
    soft_cap: float | None,
    hidden_ref,
    rows_ref,
    targets_ref,
    columns_ref,
    live_ref,
    inverse_ref,
    *seen_refs,
):
    """`Seen` of one tile of tokens over one split of the rows."""
    (tokens, _), (rows, _) = hidden_ref.shape, rows_ref.shape
    row_tiles = -(-rows // tiles.rows)
    share = -(-row_tiles // splits)
    tile, split = _place(tiles, -(-tokens // tiles.tokens), splits)
    token = _start(tile, tiles.tokens, tokens)
    targets = targets_ref[pl.ds(token, tiles.tokens), :]

    def step(tile, seen):
        row = _start(tile, tiles.rows, rows)
        x = squash(_product(tiles, hidden_ref, rows_ref, token, row), soft_cap)
        counts, hit = _columns(tiles, row, columns_ref, targets)
        fresh = row + jnp.arange(tiles.rows, dtype=jnp.int32)[None, :] >= tile * tiles.rows
        before = Seen(*[part[:, None] for part in seen])
        return _flat(absorb(before, x, counts & fresh, hit, inverse_ref[0]))

    alive = jnp.max(live_ref[pl.ds(token, tiles.tokens), 0])
    stop = jnp.minimum((split + 1) * share, row_tiles) * alive
    start = _flat(nothing(tiles.tokens, jnp.float32))
    for ref, x in zip(seen_refs, lax.fori_loop(split * share, stop, step, start), strict=True):
        ref[split, pl.ds(token, tiles.tokens)] = x


def _flat(seen: Seen) -> tuple[Float[Array, " token"], ...]:
    """Without the second axis, along which Triton would keep 128 equal registers in a loop."""
    return tuple(x.reshape(-1) for x in seen)


def _differentiate_kernel(
    tiles: Tiles,
    soft_cap: float | None,
    hidden_ref,
    rows_ref,
    targets_ref,
    columns_ref,
    live_ref,
    inverse_ref,
    *refs,
):
    """One tile of the derivative by the product."""
    *row_refs, out_ref = refs
    (tokens, _), (rows, _) = hidden_ref.shape, rows_ref.shape
    tile, column = _place(tiles, -(-tokens // tiles.tokens), -(-rows // tiles.rows))
    token, row = _start(tile, tiles.tokens, tokens), _start(column, tiles.rows, rows)
    here = pl.ds(token, tiles.tokens)
    out = out_ref.at[here, pl.ds(row, tiles.rows)]
    alive = jnp.max(live_ref[here, 0]) > 0

    @pl.when(alive)
    def _():
        product = _product(tiles, hidden_ref, rows_ref, token, row)
        x = squash(product, soft_cap)
        counts, hit = _columns(tiles, row, columns_ref, targets_ref[here, :])
        of = Row(*[ref[here, :] for ref in row_refs])
        counts = counts & (live_ref[here, :] > 0)
        of_product = differentiate(x, counts, hit, of, inverse_ref[0], soft_cap)
        pltri.store(out, of_product.astype(out_ref.dtype))

    @pl.when(~alive)
    def _():
        pltri.store(out, jnp.zeros((tiles.tokens, tiles.rows), out_ref.dtype))


# ---- Launch


def _absorb(
    hidden, unembedding, targets, columns, live, inverse, soft_cap, size, *, interpret
) -> Seen:
    del size  # the kernel has tiles of its own
    tokens, rows, tiles = _measure(hidden, unembedding, interpret)
    token_tiles = -(-tokens // tiles.tokens)
    splits = choose_splits(token_tiles, -(-rows // tiles.rows))
    kernel = _launch(
        functools.partial(_absorb_kernel, tiles, splits, soft_cap),
        "eqrl_absorb",
        token_tiles * splits,
        tiles,
        (jax.ShapeDtypeStruct((splits, tokens), jnp.float32),) * 4,
        interpret,
    )
    parts = kernel(*_prepare(hidden, unembedding, targets, columns, live, inverse))
    whole = merge(
        Seen(*[x[:, : live.shape[0], None] for x in parts]),
        lambda x: jnp.max(x, axis=0, keepdims=True),
        lambda x: jnp.sum(x, axis=0, keepdims=True),
        inverse,
    )
    # Of skipped tokens the kernel knows nothing, and log 0 is not finite.
    idle = Seen(*jnp.array([0, 1, 0, 0], jnp.float32))
    return jax.tree.map(lambda x, rest: jnp.where(live, x[0], rest), whole, idle)


def _differentiate(
    hidden, rows, targets, columns, live, inverse, soft_cap, row, *, interpret
) -> Float[Array, "token row"]:
    tokens, height, tiles = _measure(hidden, rows, interpret)
    kernel = _launch(
        functools.partial(_differentiate_kernel, tiles, soft_cap),
        "eqrl_differentiate",
        -(-tokens // tiles.tokens) * -(-height // tiles.rows),
        tiles,
        jax.ShapeDtypeStruct((tokens, height), hidden.dtype),
        interpret,
    )
    of_product = kernel(
        *_prepare(hidden, rows, targets, columns, live, inverse), *[_at_least(x) for x in row]
    )
    return of_product[: hidden.shape[0], : rows.shape[0]]


def _measure(hidden, rows, interpret: bool) -> tuple[int, int, Tiles]:
    """Tokens and rows as a kernel sees them, and the tiles for them."""
    tokens, height = max(hidden.shape[0], _SMALLEST), max(rows.shape[0], _SMALLEST)
    return tokens, height, choose_tiles(tokens, height, rows.shape[1], hidden.dtype, interpret)


def _prepare(hidden, rows, targets, columns, live, inverse) -> tuple[Array, ...]:
    """The arguments that both kernels have; a flag is a number, and numbers are arrays."""
    hidden, rows, targets = (_at_least(x) for x in (hidden, rows, targets))
    return hidden, rows, targets, columns, _at_least(live.astype(jnp.int32)), inverse.reshape(1)


def _at_least(x: Array) -> Array:
    """Zero rows below, if there are fewer than the smallest tile has."""
    return jnp.pad(x, [(0, max(0, _SMALLEST - x.shape[0])), (0, 0)])


def _launch(kernel, name: str, programs: int, tiles: Tiles, out_shape, interpret: bool):
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(programs,),
        # Never None: what that means differs between versions of jax.
        compiler_params=pltri.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
    )
