"""What trainer and engine say to each other, and how it travels: a handful of typed messages.

A message is a dataclass of JSON values and NumPy arrays. On the wire it is one line of JSON, which
says the kind, the values and the arrays' types and shapes, and then the arrays' bytes. Weights do
not travel: they lie in memory that both processes map, and `Push` says that they are new.
"""

import dataclasses
import json
from io import BufferedIOBase
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass
class Array:
    """One array of the policy in shared memory, contiguous, in eqrl's layout (`[in out]`).

    Attributes:
        names: in a Hugging Face checkpoint: one, or one a layer of a stacked array.
        shape: of the whole; a stacked array's first axis is the layer.
        dtype: as NumPy spells it.
        offset: bytes from the start of the memory.
    """

    names: list[str]
    shape: list[int]
    dtype: str
    offset: int


@dataclasses.dataclass
class Load:
    """Trainer: start, with weights of these shapes.

    Attributes:
        config: the policy's `config.json`.
        arrays: where its weights lie.
        size: bytes of the shared memory.
        options: of the engine.
    """

    config: dict[str, Any]
    arrays: list[dict[str, Any]]
    size: int
    options: dict[str, Any]


@dataclasses.dataclass
class Push:
    """Trainer: the weights in shared memory are new; take them."""


@dataclasses.dataclass
class Sample:
    """Trainer: completions of these prompts.

    Attributes:
        tokens: `[prompt time]`, padded on the right.
        positions: -1 on padding.
        ids: `[prompt]`, a stable number each.
        key: the words of the random key.
        key_type: its generator, as JAX spells it.
        seeds: `[prompt * samples]`, a number below 2**31 for each completion, from key and id.
        samples: completions a prompt.
        max_tokens: of a completion.
        stop_ids: tokens that end one.
        temperature: 0 is greedy.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ids: np.ndarray
    key: np.ndarray
    key_type: str
    seeds: np.ndarray
    samples: int
    max_tokens: int
    stop_ids: list[int]
    temperature: float


@dataclasses.dataclass
class Done:
    """Engine: it is loaded, or has the weights; with facts to show."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Completions:
    """Engine: what was sampled, a row each in the order of `Sample.seeds`.

    Attributes:
        tokens: `[row slot]`, the stop token included; 0 after the end.
        logprobs: float32, of each token.
        lengths: `[row]`.
        stopped: `[row]`, True where the last token is a stop token.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray


@dataclasses.dataclass
class Failed:
    """Engine: that did not work, and why, in one sentence."""

    why: str


Message: TypeAlias = Load | Push | Sample | Done | Completions | Failed
_KINDS = {kind.__name__: kind for kind in (Load, Push, Sample, Done, Completions, Failed)}


def send(stream: BufferedIOBase, message: Message) -> None:
    """Writes one message."""
    values, arrays = {}, {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        (arrays if isinstance(value, np.ndarray) else values)[field.name] = value
    shapes = {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}
    head = {"kind": type(message).__name__, "values": values, "arrays": shapes}
    stream.write(json.dumps(head).encode() + b"\n")
    for x in arrays.values():
        stream.write(np.ascontiguousarray(x).tobytes())
    stream.flush()


def receive(stream: BufferedIOBase) -> Message:
    """Reads one message.

    Raises:
        EOFError: if the other side is gone.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the other side of the channel is gone")
    head = json.loads(line)
    values = dict(head["values"])
    for name, (dtype, shape) in head["arrays"].items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        content = stream.read(size)
        if len(content) < size:
            raise EOFError("the other side of the channel is gone")
        values[name] = np.frombuffer(content, dtype).reshape(shape)
    return _KINDS[head["kind"]](**values)
