"""The engine's side: one message after the other, until the trainer is gone."""

import mmap
import os
import shutil
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from io import BufferedIOBase
from typing import Protocol

from .channel import Completions, Done, Failed, Load, Message, Push, Sample, receive, send


class Worker(Protocol):
    """What holds the weights and samples."""

    def push(self) -> None:
        """Takes the weights that lie in shared memory."""
        ...

    def sample(self, request: Sample) -> Completions:
        """Completions of the request's prompts."""
        ...


def serve(start: Callable[[Load, mmap.mmap], tuple[Worker, dict]], channel: int, memory: int):
    """Answers each message in turn; leaves, with all its children, when the trainer does.

    Args:
        start: from shapes, options and shared memory to a worker, and facts to show.
        channel: file descriptor of the socket.
        memory: file descriptor of the shared memory.
    """
    inbox: list[Message] = []
    scratch: list[str] = []  # folders that nobody else could remove if the trainer were killed
    arrived = threading.Condition()

    def listen() -> None:
        # A thread of its own, so that the trainer's death is seen while something runs.
        try:
            while True:
                message = receive(stream)
                with arrived:
                    inbox.append(message)
                    arrived.notify()
        except Exception:  # the trainer is gone, or what comes is no message
            leave(scratch)

    # Its two directions are used by one thread each.
    stream: BufferedIOBase = socket.socket(fileno=channel).makefile("rwb")
    threading.Thread(target=listen, daemon=True).start()
    worker: Worker | None = None
    while True:
        with arrived:
            arrived.wait_for(lambda: inbox)
            message = inbox.pop(0)
        try:
            match message:
                case Load():
                    scratch += [message.options["scratch"]] if "scratch" in message.options else []
                    worker, facts = start(message, mmap.mmap(memory, message.size))
                    answer = Done(facts)
                case Push():
                    assert worker is not None
                    worker.push()
                    answer = Done()
                case Sample():
                    assert worker is not None
                    answer = worker.sample(message)
                case _:
                    raise TypeError(f"no answer to {type(message).__name__}")
        except Exception as error:  # whatever it is, the trainer is told
            traceback.print_exc()
            answer = Failed(f"{type(error).__name__}: {error}".strip())
        try:
            send(stream, answer)
        except OSError:
            leave(scratch)


def leave(scratch: list[str]) -> None:
    """Ends this process and every one it started; the trainer gave it a group of its own."""
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)
