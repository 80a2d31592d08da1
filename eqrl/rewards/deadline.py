"""Call a function with a time limit, and take back control when it hangs.

On the main thread of a Unix process a timer signal interrupts the call: microseconds of overhead,
and nothing is left running. Elsewhere the call runs in a daemon thread that is abandoned when it
hangs. Code that hangs inside C without checking for signals can be stopped by neither; run such a
verifier in a process of its own.
"""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias


Call: TypeAlias = Callable[[Callable[[], Any], int | float], Any]


class Overtime(Exception):
    """A call took longer than it may. Not `TimeoutError`, which the call itself might raise."""


class _Interrupt(BaseException):
    """Raised inside the call when its time is up.

    No `Exception`, so that user code's `except Exception` lets it by.
    """


class _Foreign(BaseException):
    """What the handler of an earlier alarm raised; must not be taken for the call's own error."""

    def __init__(self, error: BaseException):
        super().__init__(str(error))
        self.error = error


@contextmanager
def deadline() -> Iterator[Call]:
    """A `call(fn, seconds)` that returns `fn()` or raises `Overtime`, by the best means here.

    Inside the block SIGALRM belongs to eqrl; an alarm that was pending before still goes off at
    its time, in its own handler, and handler and timer are as before after the block.
    """
    if not _signals_work():
        yield _call_in_thread
        return
    alarm = _Alarm()
    try:
        yield alarm.call
    except _Foreign as foreign:
        raise foreign.error from None
    finally:
        alarm.close()


def _signals_work() -> bool:
    if not hasattr(signal, "setitimer"):
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGALRM) is not None  # None: C code's, could not be restored


class _Alarm:
    """SIGALRM, borrowed from whoever had it."""

    def __init__(self):
        self.due: float | None = None
        # The timer first: `_fire` must not run before these fields are set.
        delay, self.interval = signal.setitimer(signal.ITIMER_REAL, 0.0)
        self.outer = time.monotonic() + delay if delay else None
        self.previous = signal.signal(signal.SIGALRM, self._fire)
        self._arm()

    def call(self, fn: Callable[[], Any], seconds: int | float) -> Any:
        try:
            try:
                self.due = time.monotonic() + seconds
                self._arm()
                return fn()
            finally:
                self.due = None
                self._arm()
        except _Interrupt:  # of this alarm: another one's would arrive as `_Foreign`
            self.due = None
            self._arm()
            raise Overtime(f"took longer than {seconds:g} s") from None

    def close(self) -> None:
        self.due = None
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, self.previous)
        if self.outer is not None:
            left = max(self.outer - time.monotonic(), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, self.interval)

    def _arm(self) -> None:
        """Set the timer to whatever is due first, ours or the one that was pending before."""
        dues = [due for due in (self.due, self.outer) if due is not None]
        left = max(min(dues) - time.monotonic(), 1e-6) if dues else 0.0
        signal.setitimer(signal.ITIMER_REAL, left)

    def _fire(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self.outer is not None and now >= self.outer:
            self.outer = now + self.interval if self.interval else None
            self._arm()
            self._pass_on(signum, frame)
        elif self.due is not None and now >= self.due:
            # Again later: the call may have swallowed the first one in a bare `except`.
            self.due = now + 0.5
            self._arm()
            raise _Interrupt
        else:
            self._arm()

    def _pass_on(self, signum: int, frame: Any) -> None:
        """Do what the earlier owner of the signal would have done."""
        if callable(self.previous):
            try:
                self.previous(signum, frame)
            except BaseException as error:
                raise _Foreign(error) from error
        elif self.previous == signal.SIG_DFL:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGALRM)  # ends the process, as it would have


def _call_in_thread(fn: Callable[[], Any], seconds: int | float) -> Any:
    answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((True, fn()))
        except BaseException as error:  # handed to the caller, who raises it
            answer.put((False, error))

    threading.Thread(target=work, daemon=True, name="eqrl-reward").start()
    try:
        done, value = answer.get(timeout=seconds)
    except queue.Empty:
        raise Overtime(f"took longer than {seconds:g} s") from None
    if done:
        return value
    raise value
