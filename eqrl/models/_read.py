"""Arrays of the model out of tensors of a checkpoint: only the parts that devices here hold."""

import math
from collections.abc import Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ._names import Entry


# What is read of a tensor at once, counted in float32, so that neither the bytes as they are stored
# nor their conversion ever take the room of a whole embedding.
_BLOCK_BYTES = 2**26
# Rows copied at once. A transposed copy of many leaves the processor's cache at every element: in
# bfloat16, 32 rows take a third of the time.
_COPIED_ROWS = 32

# First and last element plus one along each axis.
_Part: TypeAlias = tuple[tuple[int, int], ...]


@runtime_checkable
class Source(Protocol):
    """Tensors by their Hugging Face names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading any."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One part of a tensor; slices have a start, a stop and no step."""
        ...


def read_array(
    source: Source, entry: Entry, like: jax.ShapeDtypeStruct, sharding: Sharding | None
) -> jax.Array:
    """One array of the model.

    Each part goes to its devices before the next one is read; one that several devices hold is read
    once.

    Args:
        source: the checkpoint.
        entry: which tensors make the array.
        like: its shape and type.
        sharding: where it lies; `None` for the default device.
    """
    if sharding is None:
        return jnp.asarray(_read_part(source, entry, like.dtype, tuple((0, n) for n in like.shape)))
    holders: dict[_Part, list] = {}
    for device, index in sharding.addressable_devices_indices_map(like.shape).items():
        spans = index if index is not None else (slice(None),) * len(like.shape)
        part = tuple(s.indices(n)[:2] for s, n in zip(spans, like.shape, strict=True))
        holders.setdefault(part, []).append(device)
    placed = []
    for part, devices in holders.items():
        array = _read_part(source, entry, like.dtype, part)
        # Waits, because an unfinished transfer keeps the host's copy.
        placed += jax.block_until_ready([jax.device_put(array, device) for device in devices])
    return jax.make_array_from_single_device_arrays(like.shape, sharding, placed)


def _read_part(source: Source, entry: Entry, dtype: np.dtype, part: _Part) -> np.ndarray:
    """Part of an array of the model; of a stacked one, layer after layer goes into its place."""
    array = np.empty([stop - start for start, stop in part], dtype)
    if not entry.stacked:
        _fill(array, source, entry.names[0], part)
        return array
    (first, last), *rest = part
    for into, name in zip(array, entry.names[first:last], strict=True):
        if entry.transposed:
            _fill(into.T, source, name, tuple(rest[::-1]))
        else:
            _fill(into, source, name, tuple(rest))
    return array


def _fill(into: np.ndarray, source: Source, name: str, part: _Part) -> None:
    """Copies part of a tensor and converts it."""
    done = 0
    for rows in row_blocks(part):
        block = source.read(name, (rows, *(slice(*span) for span in part[1:])))
        for first in range(0, len(block), _COPIED_ROWS):
            some = block[first : first + _COPIED_ROWS]
            into[done : done + len(some)] = some
            done += len(some)


def row_blocks(part: _Part) -> Iterator[slice]:
    """The rows of part of a tensor, as many at a time as 64 MiB of float32 hold."""
    (first, last), *rest = part
    step = max(_BLOCK_BYTES // (4 * math.prod(stop - start for start, stop in rest)), 1)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))
