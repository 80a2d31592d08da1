"""How a run ended, in a file that tells the truth after every kind of end."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from .base import logger
from .files import write_json


class ExitStatus:
    """What will be written when the run ends.

    Attributes:
        step: the last finished step; the training loop keeps it up to date.
        signal: name of a signal that the loop obeyed by stopping early (`StopRequest.requested`);
            set it, and the status is `"signal"` although the loop ended in order.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.step: int | None = None
        self.signal: str | None = None
        self.status = "running"
        self._started = time.time()

    def write(self, status: str, **facts: object) -> None:
        """Replaces the file; a disk that refuses gives a warning, never an exception."""
        self.status = status
        if self.path is None:
            return
        record = {"status": status, "step": self.step, "pid": os.getpid(), **facts}
        record["started"] = _clock(self._started)
        if status != "running":
            record["ended"] = _clock(time.time())
            record["seconds"] = round(time.time() - self._started, 3)
        try:
            write_json(self.path, record)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self.path, error)


@contextlib.contextmanager
def exit_status(folder: str | Path | None) -> Iterator[ExitStatus]:
    """Keeps `folder/exit_status.json` truthful: running, then how the run ended.

    `status` is `running` inside; afterwards `success`, `exception` (with `type` and `message`) or
    `signal` (with `signal`), next to `exit_code`, `step`, `started`, `ended` and `seconds`. A
    SIGTERM that nothing else handles ends the block like an exception does, so that `finally`
    clauses run. Only `kill -9` and power loss leave `running` behind, with the dead `pid`.

    Args:
        folder: the run folder, created if need be; `None` to write nothing, for a process that
            leaves this to another one.

    Yields:
        The status; set its `step`, and `signal` if the loop stops on request.
    """
    state = ExitStatus(None if folder is None else Path(folder) / "exit_status.json")
    state.write("running")
    with _sigterm_raises():
        try:
            yield state
        except KeyboardInterrupt as error:
            _write_signal(state, str(error))
            raise
        except SystemExit as error:
            _write_system_exit(state, error)
            raise
        except BaseException as error:
            facts = {"type": type(error).__name__, "message": str(error)}
            state.write("exception", exit_code=1, **facts)
            raise
        if state.signal is not None:
            _write_signal(state, state.signal)
        else:
            state.write("success", exit_code=0)


class _Terminated(SystemExit):
    """SIGTERM as an exception; leaves the conventional exit code 143."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    # By default SIGTERM ends Python without running any `finally`.
    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    del frame
    raise _Terminated(128 + number)


def _write_signal(state: ExitStatus, name: str) -> None:
    # A plain KeyboardInterrupt is a SIGINT; `StopRequest` writes the name into its message.
    name = name if name in signal.Signals.__members__ else "SIGINT"
    state.write("signal", signal=name, exit_code=128 + signal.Signals[name].value)


def _write_system_exit(state: ExitStatus, error: SystemExit) -> None:
    if isinstance(error, _Terminated):
        _write_signal(state, "SIGTERM")
    elif error.code in (None, 0):
        state.write("success", exit_code=0)
    else:
        # `sys.exit("sentence")` prints the sentence and leaves exit code 1.
        code = error.code if isinstance(error.code, int) else 1
        state.write("exception", exit_code=code, type="SystemExit", message=str(error.code))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
