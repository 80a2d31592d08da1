"""The trainer's side of a worker process: its start, its messages in order, its end."""

import mmap
import os
import pathlib
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
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
        self._end = weakref.finalize(self, self.file.close)

    def close(self) -> None:
        self.map.close()
        self._end()


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
        self.dead = False  # rather than slow
        file, self.log = tempfile.mkstemp(prefix=f"eqrl-{name}-", suffix=".log")
        self._keep_log = False
        ours, theirs = socket.socketpair()
        fds = theirs.fileno(), memory.file.fileno()
        # A session of its own, so that Ctrl-C reaches the trainer alone, and so that what the
        # engine starts ends with it.
        self._child = subprocess.Popen(
            [python, str(_FOLDER / "__main__.py"), module, *map(str, fds)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
            start_new_session=True,
        )
        os.close(file)
        theirs.close()
        stream = ours.makefile("rwb")
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        # Threads of their own: a stopped engine takes no message, and that must not block.
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        for work, to in ((_listen, self._answers), (_speak, self._messages)):
            threading.Thread(target=work, args=(stream, to), daemon=True).start()
        # Also at exit, and when nobody refers to the engine any more.
        self._end = weakref.finalize(self, _end, self._child, ours, self._messages)

    def send(self, message: Message) -> None:
        """Gives it a message. If it is dead, the next answer says so."""
        self._messages.put(message)

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
                f"the {self._name} engine has not answered for {timeout:g} s; raise timeout= if it "
                f"is only slow; its log {self.last_words()}"
            ) from None
        if message is None:
            self.dead = True
            raise EngineError(
                f"the {self._name} engine {self._fate()}; its log {self.last_words()}"
            )
        return message

    def _fate(self) -> str:
        try:
            status = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        return f"was killed by {name}" + " (often: no memory left)" * (name == "SIGKILL")

    def last_words(self) -> str:
        """The end of its log, and where it is; it stays there."""
        self._keep_log = True
        return f"{self.log} ends with: {end_of(pathlib.Path(self.log).read_text(errors='replace'))}"

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        """Ends it and all that it started."""
        self._end()
        if not self._keep_log:
            pathlib.Path(self.log).unlink(missing_ok=True)


def end_of(log: str) -> str:
    """The last words of a program, on one line."""
    lines = log.strip().splitlines()
    return " | ".join(line.strip() for line in lines[-4:]) or "(nothing)"


def end_group(child: subprocess.Popen) -> None:
    """Kills a process that was started in a session of its own, and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _listen(stream: BufferedIOBase, answers: "queue.SimpleQueue[Message | None]") -> None:
    try:
        while True:
            answers.put(receive(stream))
    except Exception:  # the end, or what is no message: either way there is no next answer
        answers.put(None)


def _speak(stream: BufferedIOBase, messages: "queue.SimpleQueue[Message | None]") -> None:
    try:
        while (message := messages.get()) is not None:
            send(stream, message)
    except (OSError, ValueError):
        pass  # the listener sees the end too


def _end(child: subprocess.Popen, connection: socket.socket, messages: queue.SimpleQueue) -> None:
    end_group(child)
    messages.put(None)
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
