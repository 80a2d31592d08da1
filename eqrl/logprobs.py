"""Implementations of `token_logprobs`, to be passed as `implementation=`."""

import importlib
from typing import TYPE_CHECKING

from ._logprobs import (
    Implementation as Implementation,
    Layout as Layout,
    LogProbs as LogProbs,
    choose as choose,
    chunked as chunked,
    over_mesh as over_mesh,
    reference as reference,
    token_logprobs as token_logprobs,
)


if TYPE_CHECKING:
    from ._logprobs.pallas.mosaic_tpu import pallas_tpu as pallas_tpu
    from ._logprobs.pallas.triton import pallas_triton as pallas_triton

# Importing Pallas takes half a second, and few processes need it.
_KERNELS = {"pallas_tpu": "mosaic_tpu", "pallas_triton": "triton"}


def __getattr__(name: str):
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"._logprobs.pallas.{_KERNELS[name]}", __package__)
    return getattr(module, name)
