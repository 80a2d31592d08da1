"""Ctrl-C and SIGTERM as a request, not an accident."""

import contextlib
import os
import signal
from types import FrameType


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first signal asks and the second one insists.

    ```python
    with StopRequest() as stop:
        for step in range(steps):
            ...
            if stop.requested:
                break
    ```

    The first SIGINT or SIGTERM prints one line and sets `requested`; the second raises
    `KeyboardInterrupt` with the signal's name. The handlers before are restored on exit. Must be
    entered in the main thread, as Python allows handlers nowhere else.

    Attributes:
        requested: `"SIGINT"` or `"SIGTERM"` once a signal has come, else `None`.
    """

    def __init__(self):
        self.requested: str | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if self.requested is not None:
            raise KeyboardInterrupt(name)
        self.requested = name
        line = f"{name}: finishing this step, then saving; press again to quit at once\n"
        # Not `print`: the signal may have come in the middle of one, and Python's buffers refuse
        # to be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
