"""Several processes as one program: they start together, share the data, and end together."""

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
from jax._src.clusters import ClusterEnv  # what `jax.distributed` itself looks at; no public name


Item = TypeVar("Item")

# What XLA's errors say if the other end of a connection is gone.
_LOST = ("gloo", "nccl", "unavailable", "connection", "socket closed")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all that run the program.

    Attributes:
        index: of this process, from 0.
        count: of all processes.
        heartbeat_timeout: seconds after which a silent process counts as dead, and ends all.
    """

    index: int
    count: int
    heartbeat_timeout: int

    def __str__(self) -> str:
        return f"process {self.index}/{self.count}"


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = 120,
    heartbeat_timeout: int = 60,
    shutdown_timeout: int = 300,
) -> Processes:
    """Joins the other processes of the program; must come before anything that uses a device.

    Without arguments, TPU pods, Slurm and Open MPI are detected, and anything else is one process.
    With all three, nothing is detected, and this process has all devices it can see. For one
    process nothing happens. Otherwise `process i/n` is printed, `i` counting from 0.

    Args:
        coordinator: `host:port` of process 0, where it opens that port; the same everywhere.
        num_processes: how many there are; the same everywhere.
        process_id: which one this is, from 0.
        start_timeout: seconds that processes wait for each other. Then each that came says in one
            sentence what it waited for, and leaves with status 1 (`jax` would abort without one).
        heartbeat_timeout: seconds after which a silent process counts as dead. All others are then
            aborted by `jax`, with a message that lists its number. If process 0 dies, they are
            at once.
        shutdown_timeout: seconds that a process which is done waits for the others, for instance
            for process 0 to write its last checkpoint. See `together` for those that raise.

    Raises:
        ValueError: if the arguments make no sense, or are incomplete and nothing is detected.
    """
    _check_place(coordinator, num_processes, process_id)
    _check_seconds(
        start_timeout=start_timeout,
        heartbeat_timeout=heartbeat_timeout,
        shutdown_timeout=shutdown_timeout,
    )
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    missing = [name for name, value in given.items() if value is None]
    cluster, detected = _detect() if missing and num_processes != 1 else (None, None)
    num_processes = num_processes or detected
    if num_processes == 1 or (len(missing) == 3 and cluster is None):
        return Processes(0, 1, heartbeat_timeout)
    if missing and cluster is None:
        raise ValueError(
            f"{' and '.join(missing)} cannot be detected here; give coordinator, num_processes "
            "and process_id, or none of them for one process"
        )
    sentence = lambda: _missing(coordinator, num_processes, process_id, start_timeout)  # noqa: E731
    with _deadline(start_timeout, sentence):
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method=cluster or "deactivate",
            initialization_timeout=start_timeout + 30,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=shutdown_timeout,
        )
    processes = Processes(jax.process_index(), jax.process_count(), heartbeat_timeout)
    print(processes, flush=True)
    return processes


@contextlib.contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Whatever ends this process ends all: for the body of a program, around everything else.

    Python would write the traceback and then wait in `jax` for the others, which wait for this
    process. Here the traceback is written, files are flushed, and the process leaves at once; the
    others are ended after `heartbeat_timeout` seconds at most. If the exception says that another
    process is gone, this one waits that long for `jax` to name it, and then leaves as well. Those
    that `jax` ends get SIGABRT: neither `finally` nor `atexit` runs. For one process nothing
    changes.

    Args:
        processes: from `start`.
    """
    try:
        yield
    except BaseException as error:  # whatever it is, the others must not wait for it
        if processes.count == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        _leave(processes, error)


def is_first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def own_prompts(order: Sequence[Item], part: int, parts: int) -> Sequence[Item]:
    """One part of the prompts of a step: every prompt is in exactly one.

    Every process computes the same `order` from the seed and takes its own block of it, so that
    all blocks in turn are the rows of the global batch. Sampling keys hang on prompt ids, which
    are those of the whole data set, so no key is used twice either, and completions do not depend
    on the number of processes.

    Args:
        order: the prompts of the step, or their indices in the data set, global.
        part: which block to return, from 0: `jax.process_index()`, or the first of `row_part`.
        parts: how many there are: `jax.process_count()`, or the second of `row_part`.

    Raises:
        ValueError: if there is no such part, or the blocks would be of unequal length.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part={part} must be from 0 to {parts - 1}, as there are {parts} parts")
    if len(order) % parts:
        nearest = max(len(order) // parts, 1) * parts
        raise ValueError(
            f"{len(order)} prompts cannot be split evenly over {parts} processes; take {nearest}"
        )
    size = len(order) // parts
    return order[part * size : (part + 1) * size]


def _check_seconds(**seconds: int) -> None:
    for name, value in seconds.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 second")


def _check_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and process_id < 0:
        raise ValueError(f"process_id={process_id} must be at least 0")
    if None not in (num_processes, process_id) and process_id >= num_processes:  # type: ignore
        raise ValueError(
            f"process_id={process_id} must be below num_processes={num_processes}; the first is 0"
        )
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"coordinator={coordinator!r} must be the address of process 0 as host:port"
            )


def _detect() -> tuple[str | None, int | None]:
    """The name of the cluster that this process was launched by, and how many it launched."""
    for environment in ClusterEnv._cluster_types:
        name = environment.name
        if (name in ("slurm", "ompi") or name.endswith("tpu")) and environment.is_env_present():
            return name, environment.get_process_count()
    return None, None


@contextlib.contextmanager
def _deadline(seconds: float, sentence: Callable[[], str]) -> Iterator[None]:
    """Ends the process with a sentence if the body takes longer.

    `jax` aborts the process from C++ if others do not come, so there is nothing to catch.
    """

    def end():
        print(f"error: {sentence()}", file=sys.stderr)
        _exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _missing(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: float
) -> str:
    """What a process that waited for the others in vain has to say."""
    me = f"process {'?' if process_id is None else process_id}/{num_processes}"
    where = coordinator or "the address that jax detected"
    if process_id == 0:
        cause = f"not all {num_processes} processes have reached this one at {where}"
    elif coordinator is None:
        cause = f"not all {num_processes} processes have come to {where}"
    elif _answers(coordinator):
        cause = f"process 0 answers at {where}, but not all {num_processes} processes have come"
    else:
        cause = f"process 0 does not answer at {where}"
    return (
        f"{me} gave up after {seconds} s, for {cause}; check that all {num_processes} were "
        "launched (on TPU pods with --worker=all, on Slurm with srun), each with the same "
        "coordinator and its own process_id, and that no firewall closes the port"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _leave(processes: Processes, error: BaseException) -> None:
    """Reports the error, and ends this process without a word to the others."""
    status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        print(f"{processes}: {error.code}", file=sys.stderr)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"{processes} raised, which ends all processes:\n{text}", file=sys.stderr)
    if isinstance(error, jax.errors.JaxRuntimeError):
        if any(word in str(error).lower() for word in _LOST):
            # The others see the same; one that died on its own has left long before.
            wait = processes.heartbeat_timeout * 3 // 2 + 5
            print(
                f"{processes} lost another process; jax names it within {wait} s", file=sys.stderr
            )
            _flush()
            time.sleep(wait)
    _exit(status)


def _flush() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()


def _exit(status: int) -> None:
    _flush()
    os._exit(status)
