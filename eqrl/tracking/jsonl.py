"""Metrics as JSON lines: the record that is always kept, whatever happens to other trackers."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from .base import logger
from .files import write_atomic


class Jsonl:
    """One line of strict JSON a call, on disk before the call returns.

    A float that JSON cannot say is written as `null`, and what it was under `"nonfinite"`:
    `{"step": 3, "loss/total": null, "nonfinite": {"loss/total": "nan"}}`.

    On a full disk there is one warning; lines wait in memory and are written as soon as the disk
    takes them again. An existing file is continued; a last line torn by a kill is cut off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._pending: list[bytes] = []
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes `{"step": step, **metrics}` as one line."""
        self._pending.append(_line(step, metrics))
        self._flush()

    def finish(self, status: str) -> None:
        """Closes the file, after a last try to write lines a full disk had refused."""
        del status
        if self._file.closed:
            return
        self._flush()
        if self._pending:
            logger.warning("%s: %d lines could not be written", self.path, len(self._pending))
        self._file.close()

    def truncate_after(self, step: int) -> None:
        """Drops every line of a later step, so that a resumed run can write them anew.

        Args:
            step: the step resumed from; -1 empties the file.
        """
        self._file.close()
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
        write_atomic(self.path, b"".join(kept))
        self._open()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)
        if self.path.is_file():  # a device such as /dev/full has no last line to repair
            self._file.truncate(sum(map(len, _whole_lines(self.path))))

    def _flush(self) -> None:
        data = b"".join(self._pending)
        # In append mode the position before the first write is unspecified; ask for the end.
        end = self._file.seek(0, 2) if self._file.seekable() else 0
        try:
            written = self._file.write(data) or 0
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # take back half a line
            self._warn(error)
            return
        self._pending.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning(
                "%s cannot be written (%s); training goes on, lines wait in memory",
                self.path,
                error,
            )
        self._warned = True


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, also of a run that is still going on.

    Args:
        path: a file that `Jsonl` writes.

    Returns:
        One dict a line, in file order, without a torn last line.
    """
    return [json.loads(line) for line in _whole_lines(Path(path))]


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


def _line(step: int, metrics: Mapping[str, SupportsFloat]) -> bytes:
    record: dict[str, Any] = {"step": int(step)}
    nonfinite = {}
    for key, value in metrics.items():
        # Arrays of one element, NumPy and jax scalars become Python numbers here.
        value = value if isinstance(value, int) else float(value)
        if not math.isfinite(value):
            nonfinite[key] = str(value)
        record[key] = value if math.isfinite(value) else None
    if nonfinite:
        record["nonfinite"] = nonfinite
    return (json.dumps(record, allow_nan=False) + "\n").encode()
