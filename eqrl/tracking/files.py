"""Files that are either the old or the new content, never half of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; a kill leaves the old file whole.

    Args:
        path: the file; its folder is created.
        content: all of its bytes.

    Raises:
        OSError: if the disk refuses. The old file is untouched then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replaces `path` by `data` as indented JSON, atomically.

    Args:
        path: the file; its folder is created.
        data: anything JSON can say; other values are written as their `str`.
    """
    write_atomic(path, (json.dumps(data, indent=2, default=str) + "\n").encode())
