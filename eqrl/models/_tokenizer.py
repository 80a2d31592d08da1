"""Tokenizers of checkpoints, without torch."""

from pathlib import Path
from typing import Any

from ._gguf import Metadata, open_gguf
from ._gguf_tokenizer import gguf_tokenizer
from ._load import Loaded
from ._resolve import resolve


def load_tokenizer(path_or_loaded: str | Path | Loaded) -> Any:
    """The tokenizer of a checkpoint, with its chat template.

    Args:
        path_or_loaded: what `load` was given, or what it returned.

    Returns:
        A `transformers` tokenizer.

    Raises:
        ValueError: `transformers` is missing, there are no tokenizer files, or a GGUF file has a
            tokenizer of a kind that eqrl cannot rebuild.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError('tokenizers need `pip install "eqrl[examples]"`') from None
    if isinstance(path_or_loaded, Loaded):
        path = path_or_loaded.folder
    else:
        path = resolve(path_or_loaded)
    if path.suffix == ".gguf":
        return gguf_tokenizer(Metadata(open_gguf(path)))
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{path} has neither tokenizer.json nor tokenizer_config.json")
    return transformers.AutoTokenizer.from_pretrained(path)
