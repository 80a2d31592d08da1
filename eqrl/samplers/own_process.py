"""The in-process decoder, in a process of its own."""

import dataclasses
import pathlib
import sys
from typing import ClassVar

from .process_engine import ProcessEngine


@dataclasses.dataclass(eq=False)
class OwnProcess(ProcessEngine):
    """`Decoder` beside the trainer: the same completions, bit for bit, while the trainer trains.

    It runs in this interpreter's environment, on the first device that `environment` lets it see.
    """

    name: ClassVar[str] = "own-process"
    module: ClassVar[str] = "decoder"

    def variables(self) -> dict[str, str]:
        """eqrl is found where it is found here, also if it is not installed."""
        return {
            "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])
        } | super().variables()

    def python(self) -> str:
        """This one."""
        return sys.executable
