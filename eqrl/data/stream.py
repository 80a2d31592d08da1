"""Which prompts come next: a shuffled pass over the dataset, an epoch at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StreamState(NamedTuple):
    """Position in the stream, as plain integers for a checkpoint."""

    seed: int
    epoch: int
    cursor: int


class PromptStream:
    """Dataset indices in an order that depends on the seed and the epoch only.

    Within an epoch every index comes exactly once; an epoch that ends inside a `take` is followed
    by the next one, so a take may hold an index twice only across that border (or, when longer
    than the dataset, several times). The order is a stable sort of Philox's raw numbers, keyed by
    `(seed, epoch)`, so it does not change with the version of NumPy.
    """

    def __init__(self, size: int, seed: int):
        """A stream at its beginning.

        Args:
            size: number of records.
            seed: a non-negative integer below 2**64.

        Raises:
            ValueError: if `size` is not positive or `seed` is out of range.
        """
        if size < 1:
            raise ValueError(f"`size` is {size}; a stream needs at least one record")
        self.size = size
        self.restore(StreamState(seed, 0, 0))

    def take(self, n: int) -> list[int]:
        """The next `n` indices, which may be more than the dataset holds."""
        if n < 0:
            raise ValueError(f"`n` is {n}; take zero or more")
        taken: list[int] = []
        while len(taken) < n:
            if self._cursor == self.size:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = _order(self.size, self._seed, self._epoch)
            part = self._order[self._cursor : self._cursor + n - len(taken)]
            self._cursor += len(part)
            taken.extend(part)
        return taken

    def state(self) -> StreamState:
        """Seed, epoch, and how many indices of the epoch were taken."""
        return StreamState(self._seed, self._epoch, self._cursor)

    def restore(self, state: Sequence[int]) -> None:
        """Continue bit for bit from `state`, its seed included.

        Args:
            state: what `state()` returned, or the same three integers in any sequence.

        Raises:
            ValueError: if the numbers do not fit this stream, as after a change of dataset.
        """
        seed, epoch, cursor = (int(part) for part in state)
        if not 0 <= seed < 2**64:
            raise ValueError(f"`seed` is {seed}; give an integer in [0, 2**64)")
        if epoch < 0 or not 0 <= cursor <= self.size:
            raise ValueError(
                f"`state` is at record {cursor} of epoch {epoch}, but the dataset has {self.size} "
                "records; resume with the dataset the state was saved with"
            )
        self._seed, self._epoch, self._cursor = seed, epoch, cursor
        self._order = _order(self.size, seed, epoch)


def _order(size: int, seed: int, epoch: int) -> list[int]:
    key = np.array([seed, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable").tolist()
