"""The in-process decoder, in a process of its own."""

import dataclasses
import os
import pathlib
import sys
from typing import Any, ClassVar

import jax

from ..models import Transformer
from .process_engine import ProcessEngine


# What JAX's numbers depend on besides the environment that the process inherits.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


@dataclasses.dataclass(eq=False)
class OwnProcess(ProcessEngine):
    """`Decoder` beside the trainer: the same completions, bit for bit, while the trainer trains.

    It runs in this interpreter's environment, on the first device that `environment` lets it see.
    """

    name: ClassVar[str] = "own-process"
    module: ClassVar[str] = "decoder"

    def variables(self) -> dict[str, str]:
        """eqrl is found where it is found here, also if it is not installed."""
        root = str(pathlib.Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths)} | super().variables()

    def options(self, policy: Transformer) -> dict[str, Any]:
        """JAX's settings as they are here."""
        return {"settings": {name: getattr(jax.config, name) for name in _SETTINGS}}

    def python(self) -> str:
        """This one."""
        return sys.executable
