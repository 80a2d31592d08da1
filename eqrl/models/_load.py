"""Checkpoints in: Hugging Face folders and GGUF files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._architecture import Architecture
from ._gguf import GGUFSource
from ._known import known
from ._names import abstract, entries
from ._read import Source, read_array, row_blocks
from ._resolve import local, resolve
from ._safetensors import SafetensorsSource, read_json, stop_ids
from ._transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        model: the weights.
        architecture: `model.architecture`.
        stop_ids: ids that end a completion; possibly several, possibly none.
        folder: what `load_tokenizer` reads: a folder, or the GGUF file.
    """

    model: Transformer
    architecture: Architecture
    stop_ids: tuple[int, ...]
    folder: Path


def load(
    path_or_repo: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    place: Callable[[Transformer], PyTree] | None = None,
) -> Loaded:
    """Reads a Qwen2/2.5, Qwen3 or Llama/SmolLM2 checkpoint.

    Arrays are read one by one, so the peak is the model plus its largest stacked array. With
    `place`, every part of an array goes to its devices before the next one is read, and a process
    reads only the parts that its own devices hold: the peak is what they hold plus one part.

    Args:
        path_or_repo: a folder with `config.json` and safetensors (one file or shards); a `.gguf`
            file or a folder with one; `"smollm2"`; or a hub id.
        dtype: of the weights, and so of the computation, whatever the file has.
        place: given the model with a `jax.ShapeDtypeStruct` for each array, returns the same tree
            with a `jax.sharding.Sharding` for each, such as `eqrl.sharding.placement(mesh)`. By
            default all arrays lie on the default device.

    Returns:
        The model and what belongs to it.

    Raises:
        ValueError: one sentence: what is not found, not supported, missing, left over or of the
            wrong shape.
    """
    path = resolve(path_or_repo)
    if path.suffix == ".gguf":
        source = GGUFSource(path)
        architecture, stops = source.architecture, source.metadata.stop_ids()
    else:
        architecture, stops = _read_config(path), stop_ids(path)
        source = SafetensorsSource(path)
    return Loaded(_build(source, architecture, dtype, place), architecture, stops, path)


def architecture_of(path_or_repo: str | Path) -> Architecture:
    """The architecture of a checkpoint without its weights, and without the hub.

    Args:
        path_or_repo: as for `load`; a folder needs nothing but `config.json`, and a hub id must be
            one that `known` knows.

    Raises:
        ValueError: one sentence: what is not found, or not supported.
    """
    path = local(path_or_repo)
    if path is None:
        return known(str(path_or_repo))
    return GGUFSource(path).architecture if path.suffix == ".gguf" else _read_config(path)


def _read_config(folder: Path) -> Architecture:
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{folder} has no config.json; name a folder that transformers opens")
    return Architecture.from_config(config)


def _build(source: Source, architecture: Architecture, dtype: DTypeLike, place) -> Transformer:
    wanted = list(entries(architecture))
    _check(source, wanted, architecture)
    model = abstract(architecture, dtype)
    likes, tree = jax.tree.flatten(model)
    where = [None] * len(likes)
    if place is not None:
        where, placed = jax.tree.flatten(place(model))
        if placed != tree:
            raise ValueError(
                "place must return a tree like the model it is given, with a sharding for each "
                "array; use eqrl.sharding.placement(mesh)"
            )
    arrays = [read_array(source, *how) for how in zip(wanted, likes, where, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def _check(source, wanted, architecture):
    """Refuses missing, misshapen and left-over tensors before anything is read."""
    shapes = source.shapes()
    expected = {name: entry.shape for entry in wanted for name in entry.names}
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(f"the checkpoint lacks the tensor {name!r} that its config calls for")
        if shapes[name] != shape:
            raise ValueError(f"the tensor {name!r} has shape {shapes[name]}, not {shape}")
    for name in sorted(shapes.keys() - expected.keys()):
        if not _redundant(source, name, architecture):
            raise ValueError(
                f"the checkpoint holds the tensor {name!r}, for which a {architecture.family} "
                "with this config has no place"
            )


def _redundant(source, name, architecture):
    """Old files carry the rotary frequencies, or a second copy of a tied embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not architecture.tied:
        return False
    other, (rows, width) = "model.embed_tokens.weight", source.shapes()[name]
    return source.shapes()[other] == (rows, width) and all(
        np.array_equal(source.read(name, index), source.read(other, index))
        for index in ((block, slice(0, width)) for block in row_blocks(((0, rows), (0, width))))
    )
