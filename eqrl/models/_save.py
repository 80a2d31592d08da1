"""Checkpoints out: a folder that transformers, vLLM and `load` open."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from ._names import Entry, entries
from ._transformer import Transformer


_SHARD_BYTES = 5 * 10**9


def save(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    stop_ids: Sequence[int] = (),
    dtype: DTypeLike | None = None,
) -> None:
    """Writes `config.json`, `generation_config.json`, safetensors and tokenizer files.

    All is written into a temporary folder beside `folder`, which then takes its name: a crash
    leaves either no `folder` or the one that was there. A checkpoint that is there is replaced.

    Args:
        model: the weights; a tied unembedding is not written twice.
        folder: where to.
        tokenizer: a `transformers` tokenizer to put beside the weights.
        stop_ids: ids that end a completion.
        dtype: of the file; by default that of the model.

    Raises:
        ValueError: `folder` holds something that is no checkpoint.
    """
    folder = Path(folder).expanduser().absolute()
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=folder.parent))
    try:
        work.chmod(0o755)
        _write_tensors(model, work, dtype or model.embedding.dtype)
        _write_configs(model, work, list(stop_ids), dtype or model.embedding.dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        _replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_foreign(folder):
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; name another one")
    if any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(
            f"folder={str(folder)!r} is not empty and is no checkpoint; name another one"
        )


def _replace(work, folder):
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        os.replace(folder, old)
        os.replace(work, folder)
        shutil.rmtree(old)
    else:
        os.replace(work, folder)


def _write_configs(model, folder, stop_ids, dtype):
    stops = {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids} if stop_ids else {}
    config = model.architecture.to_config() | {"torch_dtype": np.dtype(dtype).name}
    _write_json(folder / "config.json", config | stops)
    _write_json(folder / "generation_config.json", stops)


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(model, folder, dtype):
    from safetensors.numpy import save_file

    width = np.dtype(dtype).itemsize
    shards = list(_shards(model, width))
    leaves = dict(zip(entries(model.architecture), jax.tree.leaves(model), strict=True))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _tensor(leaves[entry], entry, i, dtype) for name, entry, i in shard}
        # transformers refuses files that do not say which framework's layout they have.
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it readable to its owner only
        weight_map |= {name: file for name in tensors}
    if len(shards) > 1:
        total = sum(leaf.size * width for leaf in leaves.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(model, width) -> Iterator[list[tuple[str, Entry, int]]]:
    """Tensors in the order of the model, cut where a file would pass 5 GB."""
    shard, size = [], 0
    for entry in entries(model.architecture):
        bytes_each = width * int(np.prod(entry.shape))
        for i, name in enumerate(entry.names):
            if shard and size + bytes_each > _SHARD_BYTES:
                yield shard
                shard, size = [], 0
            shard.append((name, entry, i))
            size += bytes_each
    yield shard


def _tensor(leaf, entry: Entry, i: int, dtype) -> np.ndarray:
    array = np.asarray(leaf[i] if entry.stacked else leaf).astype(dtype)
    # safetensors writes the buffer as it lies in memory, so a transposed view must be copied.
    return np.ascontiguousarray(array.T if entry.transposed else array)
