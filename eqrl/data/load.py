"""Records from a folder, a file or the Hugging Face hub, with every field kept."""

import json
import re
from pathlib import Path
from typing import Any, TypeAlias


Record: TypeAlias = dict[str, Any]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Seconds to wait for the hub's first answer. `datasets` alone retries for more than 20 s.
_PROBE_SECONDS = 8.0


def load_records(path: str, split: str, *, config: str | None = None) -> list[Record]:
    """The records of one split, in file order.

    Args:
        path: a folder with `{split}.jsonl` or `{split}.json`; a `.jsonl` or `.json` file, which
            is read whole whatever `split` says; or a hub id, as `owner/name`.
        split: the split's name, as "train".
        config: a hub dataset's configuration. Without one: the only one there is, else
            "default", else "main".

    Returns:
        One dictionary a record.

    Raises:
        ValueError: in one sentence, if there is no such data, it cannot be read, it holds no
            records, or the hub cannot be reached.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        records = _read(_split_file(place, split))
    elif place.is_file():
        records = _read(place)
    elif place.suffix in (".jsonl", ".json") or not _HUB_ID.fullmatch(path):
        raise ValueError(
            f"there is no file or folder {path!r} (looked from {Path.cwd()}); give a folder with "
            f"{split}.jsonl, a .jsonl file or a hub id such as owner/name"
        )
    else:
        records = _from_hub(path, split, config)
    if not records:
        raise ValueError(f"{path!r} holds no records for split {split!r}; give data that has some")
    return records


def _split_file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.json"):
        if (folder / name).is_file():
            return folder / name
    there = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    raise ValueError(
        f"the folder {str(folder)!r} has no {split}.jsonl, only {there or 'no JSON files'}; name "
        "one of its splits or another folder"
    )


def _read(file: Path) -> list[Record]:
    match file.suffix:
        case ".jsonl":
            return _read_lines(file)
        case ".json":
            return _read_list(file)
    raise ValueError(f"{str(file)!r} is neither .jsonl nor .json; convert it to one object a line")


def _read_lines(file: Path) -> list[Record]:
    records = []
    # Only "\n" ends a line: JSON strings may hold U+2028, at which `splitlines` would cut.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(_parse(line, f"{file}, line {number}"))
                _expect_object(records[-1], f"{file}, line {number}")
    return records


def _read_list(file: Path) -> list[Record]:
    records = _parse(file.read_bytes(), str(file))
    if not isinstance(records, list):
        raise ValueError(f"{file} holds no list of records; give [{{...}}, ...] or a .jsonl file")
    for number, record in enumerate(records, 1):
        _expect_object(record, f"{file}, record {number}")
    return records


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"{where} is no valid JSON ({error}); correct or remove it") from None


def _expect_object(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object; every record needs named fields")


def _from_hub(name: str, split: str, config: str | None) -> list[Record]:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name!r} is no local path, and reading it from the hub needs the package `datasets`; "
            'install "eqrl[examples]" or give a folder'
        ) from None
    if not huggingface_hub.is_offline_mode():
        _probe(name)
    try:
        config = config or _choose_config(name, datasets.get_dataset_config_names(name))
        return [dict(record) for record in datasets.load_dataset(name, config, split=split)]
    except Exception as error:  # whatever the hub's libraries raise becomes one sentence
        raise ValueError(_hub_sentence(name, error)) from None


def _probe(name: str) -> None:
    """One request without retries, so that a missing network is noticed at once."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_PROBE_SECONDS)
    except Exception as error:  # the exceptions of the HTTP library under it change by version
        raise ValueError(_hub_sentence(name, error)) from None


def _choose_config(name: str, configs: list[str]) -> str:
    if len(configs) == 1:
        return configs[0]
    for usual in ("default", "main"):
        if usual in configs:
            return usual
    raise ValueError(f"it has the configurations {configs}: name one with `config`")


def _hub_sentence(name: str, error: Exception) -> str:
    import huggingface_hub

    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    offline = huggingface_hub.is_offline_mode()
    cached = "unset HF_HUB_OFFLINE" if offline else "set HF_HUB_OFFLINE=1 to use a cached copy"
    return (
        f"could not read {name!r}, which is no local path, from the Hugging Face hub ({reason}); "
        f"give a folder with JSONL files, or {cached}"
    )
