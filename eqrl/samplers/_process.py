"""The trainer's side of a worker process: its start, its messages in order, its end."""

import atexit
import mmap
import os
import pathlib
import queue
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from io import BufferedIOBase
from typing import IO

from ._worker.channel import Message, receive, send
from .engine import EngineError


_FOLDER = pathlib.Path(__file__).parent / "_worker"


class SharedMemory:
    """Memory that two processes map, without a name that could be left behind."""

    def __init__(self, size: int):
        available = _available_bytes()
        if available is not None and size > available:
            raise EngineError(
                f"no {size / 2**30:.1f} GiB of host memory for a copy of the weights, only "
                f"{available / 2**30:.1f}; a smaller dtype or another backend takes less"
            )
        if hasattr(os, "memfd_create"):
            # Not in /dev/shm, which containers keep small.
            self.file: IO[bytes] = os.fdopen(os.memfd_create("eqrl-weights"), "r+b")
        else:  # a file without a name; it lives as long as a process has it open
            self.file = tempfile.TemporaryFile()
        self.file.truncate(size)
        self.map = mmap.mmap(self.file.fileno(), size)

    def close(self) -> None:
        self.map.close()
        self.file.close()


def _available_bytes() -> int | None:
    """Of host memory, where the system says it."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


class Process:
    """A worker. Answers come in the order of the messages.

    Args:
        name: of the engine, for messages.
        python: interpreter of the environment it runs in.
        module: of `_worker`.
        memory: both sides map it.
        environment: variables on top of this process's.
    """

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        memory: SharedMemory,
        environment: Mapping[str, str],
    ):
        self._name = name
        self._log = tempfile.NamedTemporaryFile(prefix=f"eqrl-{name}-", suffix=".log", delete=False)
        ours, theirs = socket.socketpair()
        fds = theirs.fileno(), memory.file.fileno()
        # Fresh file descriptors in the child; a session of its own, so that Ctrl-C reaches the
        # trainer alone, and so that what the engine starts ends with it.
        self._child = subprocess.Popen(
            [python, str(_FOLDER / "__main__.py"), module, *map(str, fds)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        self._stream: BufferedIOBase = ours.makefile("rwb")
        self.dead = False  # rather than slow
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    def _listen(self) -> None:
        try:
            while True:
                self._answers.put(receive(self._stream))
        except (EOFError, OSError, ValueError):
            self._answers.put(None)

    def send(self, message: Message) -> None:
        """Gives it a message.

        Raises:
            EngineError: if it is dead.
        """
        try:
            send(self._stream, message)
        except (OSError, ValueError):
            raise EngineError(self._obituary()) from None

    def answer(self, timeout: float) -> Message:
        """Its next answer.

        Args:
            timeout: seconds to wait.

        Raises:
            EngineError: if it dies, or does not answer in time.
        """
        try:
            message = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise EngineError(
                f"the {self._name} engine has not answered for {timeout:.0f} s; raise timeout= if "
                f"it is only slow, else see its log {self._log.name}"
            ) from None
        if message is None:
            raise EngineError(self._obituary())
        return message

    def _obituary(self) -> str:
        self.dead = True
        try:
            status = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        how = "closed its channel" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += " (often: no memory left)"
        return f"the {self._name} engine {how}; its log {self._log.name} ends with: {self._tail()}"

    def _tail(self) -> str:
        lines = pathlib.Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:]) or "(nothing)"

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        """Ends it and all that it started."""
        atexit.unregister(self.close)
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._child.wait()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._stream.close()
        except OSError:
            pass
        self._socket.close()
        self._log.close()
        if not self.dead:  # else somebody wants to read it
            pathlib.Path(self._log.name).unlink(missing_ok=True)
