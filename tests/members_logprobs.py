"""Every implementation of the log-probs, a row each."""

import dataclasses
import functools
from collections.abc import Callable

from eqrl import logprobs
from eqrl._logprobs.chunked import KERNELS
from eqrl._logprobs.pallas import mosaic_tpu, triton
from eqrl._logprobs.stored import stored
from eqrl._logprobs.streamed import Kernels


@dataclasses.dataclass(frozen=True)
class Member:
    """An implementation on this machine.

    Attributes:
        name: of the test.
        function: the implementation.
        kernels: its two steps, if it has them.
        compiled: it is written for a compiler of its own, and interpreted here: float32 and
            bfloat16 only.
    """

    name: str
    function: Callable
    kernels: Kernels | None = None
    compiled: bool = False

    def __repr__(self) -> str:
        return self.name


IMPLEMENTATIONS = [
    Member("reference", logprobs.reference),
    Member("chunked", functools.partial(logprobs.chunked, size=512), KERNELS),
    Member("stored", stored),
    Member(
        "pallas_tpu",
        functools.partial(logprobs.pallas_tpu, interpret=True),
        mosaic_tpu._kernels(mosaic_tpu.Launch(None, True)),
        compiled=True,
    ),
    Member(
        "pallas_triton",
        functools.partial(logprobs.pallas_triton, interpret=True),
        triton._kernels(True),
        compiled=True,
    ),
]
