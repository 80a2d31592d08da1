"""Tensors of a folder in Hugging Face's layout, part by part."""

import json
from pathlib import Path
from typing import Any

import numpy as np


class SafetensorsSource:
    """Tensors by name out of `model.safetensors`, or out of the shards its index names."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self._files = {}
        for file in _files(folder):
            opened = safe_open(file, framework="numpy")
            self._files |= {name: opened for name in opened.keys()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, without reading any."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor in the type it is stored in; nothing else of it is read."""
        return self._files[name].get_slice(name)[index]


def _files(folder):
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    elif single.is_file():
        names = [single.name]
    else:
        raise ValueError(f"{folder} holds neither model.safetensors nor its index, nor a .gguf")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing although {index.name} names it")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `{}` when there is no such file."""
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def stop_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids of `generation_config.json`, then those only `config.json` has."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token not in found:
                found.append(token)
    return tuple(found)
