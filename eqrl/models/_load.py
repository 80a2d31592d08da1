"""Checkpoints in: Hugging Face folders and GGUF files."""

import dataclasses
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ._architecture import Architecture
from ._gguf import GGUFSource
from ._names import Entry, entries, skeleton
from ._resolve import resolve
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


_Source: TypeAlias = SafetensorsSource | GGUFSource


def load(path_or_repo: str | Path, *, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Reads a Qwen2/2.5, Qwen3 or Llama/SmolLM2 checkpoint.

    Tensors are read one by one, so the peak is the model plus its largest stacked array.

    Args:
        path_or_repo: a folder with `config.json` and safetensors (one file or shards); a `.gguf`
            file or a folder with one; `"smollm2"`; or a hub id.
        dtype: of the weights, and so of the computation, whatever the file has.

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
        config = read_json(path / "config.json")
        if not config:
            raise ValueError(f"{path} has no config.json; name a folder that transformers opens")
        architecture, stops = Architecture.from_config(config), stop_ids(path)
        source = SafetensorsSource(path)
    return Loaded(_build(source, architecture, dtype), architecture, stops, path)


def _build(source: _Source, architecture: Architecture, dtype) -> Transformer:
    wanted = list(entries(architecture))
    _check(source, wanted, architecture)
    leaves = [_read(source, entry, dtype) for entry in wanted]
    return jax.tree.unflatten(jax.tree.structure(skeleton(architecture)), leaves)


def _read(source, entry: Entry, dtype):
    """One array of the model; of a stacked one, layer after layer goes into its place."""

    def tensor(name):
        array = source.read(name)
        return array.T if entry.transposed else array

    if not entry.stacked:
        return jnp.asarray(tensor(entry.names[0]).astype(dtype))
    shape = entry.shape[::-1] if entry.transposed else entry.shape
    stacked = np.empty((len(entry.names), *shape), dtype)
    for i, name in enumerate(entry.names):
        stacked[i] = tensor(name)
    return jnp.asarray(stacked)


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
    return np.array_equal(source.read(name), source.read("model.embed_tokens.weight"))
