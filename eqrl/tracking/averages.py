"""Where a step's time goes, and how many tokens it buys."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator


class StepTimer:
    """Wall time of the phases of a training step.

    ```python
    timer = StepTimer()
    for step in range(steps):
        with timer.step():
            with timer("rollout"):
                ...
            with timer.excluded("eval"):      # not part of the step's time
                ...
        metrics |= timer.metrics()
    ```

    jax runs ahead of Python: a phase must wait for its results (`jax.block_until_ready`, or a
    number read from the device) before it ends, or a later phase pays for it.

    Args:
        window: how many of the last steps enter the average.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(self, *, window: int = 10, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._recent: collections.deque[float] = collections.deque(maxlen=window)
        self._phases: dict[str, float] = {}
        self._excluded: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a phase of the step; a phase entered twice adds up."""
        with self._timed(self._phases, phase):
            yield

    @contextlib.contextmanager
    def excluded(self, phase: str) -> Iterator[None]:
        """Times evaluation or saving; inside a step it is subtracted from the step's time."""
        with self._timed(self._excluded, phase):
            yield

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times one training step and forgets the phases of the one before."""
        self._phases.clear()
        self._excluded.clear()
        start = self._clock()
        yield
        # Not in a `finally`: a step that failed must not enter the average.
        seconds = self._clock() - start - sum(self._excluded.values())
        self._phases["step"] = seconds
        self._recent.append(seconds)

    def metrics(self) -> dict[str, float]:
        """The last step: `time/train/<phase>_s`, `time/train/step_s`, the mean of the last steps.

        The mean is called `time/train/step_avg_last<window>_s`; excluded phases `time/<phase>_s`.
        """
        found = {f"time/train/{phase}_s": value for phase, value in self._phases.items()}
        found |= {f"time/{phase}_s": value for phase, value in self._excluded.items()}
        if self._recent:
            name = f"time/train/step_avg_last{self._recent.maxlen}_s"
            found[name] = sum(self._recent) / len(self._recent)
        return found

    def seconds(self, phase: str) -> float:
        """Seconds the last step spent in `phase`, 0 if it was not entered."""
        return self._phases.get(phase, 0.0)

    @contextlib.contextmanager
    def _timed(self, table: dict[str, float], phase: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            table[phase] = table.get(phase, 0.0) + self._clock() - start


def throughput(count: int | float, seconds: int | float) -> float:
    """Things a second; 0 where no time was measured.

    Args:
        count: tokens, sequences, questions.
        seconds: the time they took.

    Returns:
        `count / seconds`, finite always.
    """
    return count / seconds if seconds > 0 else 0.0
