"""sglang-jax in a process and an environment of its own."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any, ClassVar

import jax

from .._prompts import Prompts
from ..models import Transformer, widen_heads
from ._verify import verify
from .base import Sampling
from .engine import EngineError
from .process_engine import Asked, ProcessEngine


# Where `python -m eqrl.samplers.install_sglang_jax` puts it.
ENVIRONMENT = pathlib.Path.home() / ".cache" / "eqrl" / "sglang-jax"
# The width of a head that its attention is made for.
_HEAD_DIM = 128
# Tokens that it keeps free of a context.
_SPARE = 8
# Policies whose first rollout at each temperature is compared with their own forward: the first,
# and the next, which is given to an engine that has sampled.
_VERIFIED = 2


@dataclasses.dataclass(eq=False)
class SGLangJax(ProcessEngine):
    """The engine of sglang-jax 0.1.0rc0, which pins jax, flax and numpy, and needs Python 3.12.

    It batches continuously and pages its cache, so completions of very different lengths cost what
    they are long. It draws exactly: each completion by a seed of its own from the key and its
    prompt's id, whatever else is in the batch. Heads that are no multiple of 128 wide are widened
    on the way (not on a TPU, where it pads them itself); its cache takes 128 in any case.

    Memory on each of its devices: weights and `max_total_tokens` times `2 * layers * max(kv heads,
    tp_size) * max(head_dim, 128) * bytes`, both over `tp_size`; off TPUs attention scores besides,
    `12 * heads * max(context_length, 1024) * max_total_tokens` bytes. Checked before it loads.

    Attributes:
        context_length: tokens of prompt and completion at most.
        max_running_requests: completions decoded at the same time; further ones wait.
        max_total_tokens: of the cache; by default enough for all running requests at full length.
        mem_fraction_static: of a device's memory, for weights and cache; the engine's own default.
            The smaller of both limits holds.
        tp_size: devices it is cut over.
        dtype: of weights and cache, `float32` or `bfloat16`; the policy's by default.
        device: `cpu`, `tpu` or `gpu`; the trainer's kind by default.
        tolerance: mean absolute difference in nats between its log-probs and the policy's own, at
            which the run ends. Compared on a few rows of the first rollout at each temperature,
            of the first policy and of the one after the first update.
        python_path: the interpreter of its environment. By default the one that
            `EQRL_SGLANG_PYTHON` names, else this one if it has sglang-jax, else the one that
            `python -m eqrl.samplers.install_sglang_jax` has made.

    Raises:
        ValueError: if a number is out of its range.

    Source: https://github.com/sgl-project/sglang-jax
    """

    context_length: int = 4096
    max_running_requests: int = 64
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    tp_size: int = 1
    dtype: str | None = None
    device: str | None = None
    tolerance: float = 0.05
    python_path: str | None = None

    name: ClassVar[str] = "sglang-jax"
    module: ClassVar[str] = "sglang_jax"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._folder: pathlib.Path | None = None
        self._verified: set[tuple[int, float]] = set()
        for name in ("context_length", "max_running_requests", "max_total_tokens", "tp_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if not isinstance(self.tolerance, int | float) or not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance!r} must be a number above 0")
        fraction = self.mem_fraction_static
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"mem_fraction_static={fraction} must lie between 0 and 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
        if self.device not in (None, "cpu", "tpu", "gpu"):
            raise ValueError(f"device={self.device!r} must be 'cpu', 'tpu' or 'gpu'")

    def python(self) -> str:
        """See `ProcessEngine`."""
        given = self.python_path or os.environ.get("EQRL_SGLANG_PYTHON")
        if given is None and importlib.util.find_spec("sgl_jax") is not None:
            return sys.executable
        made = ENVIRONMENT / "bin" / "python"
        if given is None and made.exists():
            return str(made)
        if given is None or not pathlib.Path(given).exists():
            missing = "no sglang-jax here" if given is None else f"python_path={given} is not there"
            raise ValueError(
                f"{missing}; make its environment with `python -m eqrl.samplers.install_sglang_jax`"
            )
        return given

    def variables(self) -> dict[str, str]:
        """Its platform is its own matter, and so is where its packages lie."""
        platform = {"gpu": "cuda"}.get(self._device(), self._device())
        return {"JAX_PLATFORMS": platform, "PYTHONPATH": ""} | super().variables()

    def prepared(self, policy: Transformer) -> Transformer:
        """With heads that its attention can take."""
        if self._device() == "tpu":
            return policy
        width = policy.architecture.head_dim
        return widen_heads(policy, -(-width // _HEAD_DIM) * _HEAD_DIM)

    def options(self, policy: Transformer) -> dict[str, Any]:
        """Its own arguments, and a folder that has the policy's `config.json` and no weights."""
        facts = policy.architecture
        if facts.mlp_bias:
            raise ValueError("mlp_bias: sglang-jax leaves such biases out; use another backend")
        if facts.vocab_size % self.tp_size:
            raise ValueError(
                f"tp_size={self.tp_size} does not divide the vocabulary of {facts.vocab_size}"
            )
        self._folder = self._folder or pathlib.Path(tempfile.mkdtemp(prefix="eqrl-sglang-"))
        config = facts.to_config() | {"torch_dtype": self.dtype or str(policy.embedding.dtype)}
        (self._folder / "config.json").write_text(json.dumps(config))
        tokens = self.max_total_tokens or self.max_running_requests * self.context_length
        return {
            "scratch": str(self._folder),
            "device": self._device(),
            "dtype": config["torch_dtype"],
            "context_length": self.context_length,
            "max_running_requests": self.max_running_requests,
            "max_total_tokens": tokens,
            "mem_fraction_static": self.mem_fraction_static,
            "tp_size": self.tp_size,
        }

    def admit(self, prompts: Prompts, sampling: Sampling) -> None:
        """A prompt and its completion must fit into the context."""
        longest = int((prompts.positions >= 0).sum(axis=1).max())
        least = longest + sampling.max_tokens + _SPARE
        if least > self.context_length:
            raise EngineError(
                f"context_length={self.context_length} is too short for a prompt of {longest} and "
                f"{sampling.max_tokens} new tokens; give at least {least}"
            )

    def compare(self, policy: Transformer, asked: Asked) -> None:
        """The first rollouts with the policy's own forward; see `tolerance`."""
        what = (self._pushes, float(asked.sampling.temperature))
        if self._pushes <= _VERIFIED and what not in self._verified:
            self._verified.add(what)
            who, tolerance = self.name, self.tolerance
            verify(policy, asked.result(), asked.sampling, tolerance=tolerance, who=who)

    def close(self) -> None:
        """See `Engine`."""
        super().close()
        self._verified.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _device(self) -> str:
        return self.device or jax.default_backend()
