"""What a tracker is, and how several of them share one run."""

import contextlib
import logging
from collections.abc import Mapping
from typing import Protocol, SupportsFloat, runtime_checkable


logger = logging.getLogger("eqrl")


@runtime_checkable
class Tracker(Protocol):
    """Something that is told the numbers of a run."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Records metrics of one step; several calls with the same step are legal."""
        ...

    def finish(self, status: str) -> None:
        """Ends the record; `status` is `"success"`, `"exception"` or `"signal"`."""
        ...


class Combined:
    """Trackers side by side. One that raises is dropped with one warning; the run goes on."""

    def __init__(self, trackers: tuple[Tracker, ...]):
        self.trackers = trackers

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Tells every tracker that is still alive."""
        for tracker in self.trackers:
            try:
                tracker.log(step, metrics)
            # Whatever a third party's logger raises, it must not cost hours of training.
            except Exception as error:
                self._drop(tracker, error)

    def finish(self, status: str) -> None:
        """Ends every tracker that is still alive."""
        for tracker in self.trackers:
            try:
                tracker.finish(status)
            except Exception as error:  # as in `log`
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        # A new tuple: the loop that called us still walks the old one.
        self.trackers = tuple(other for other in self.trackers if other is not tracker)
        with contextlib.suppress(Exception):  # what it has may still be worth closing
            tracker.finish("exception")
        logger.warning(
            "tracker %s failed (%s: %s); it is dropped, the run and the other trackers go on",
            type(tracker).__name__,
            type(error).__name__,
            error,
        )


def combine(*trackers: Tracker) -> Combined:
    """Trackers as one tracker that outlives any of them.

    Args:
        *trackers: told in this order.

    Returns:
        A tracker; `.trackers` holds those still alive.
    """
    return Combined(trackers)
