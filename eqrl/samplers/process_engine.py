"""Engines in a process of their own on this machine, which are given weights through memory."""

import abc
import collections
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer
from ..models._names import entries
from ._process import Process, SharedMemory
from ._requests import Completion, seeds, to_rollout
from ._worker.channel import Array, Completions, Done, Failed, Load, Message, Push, Sample
from .base import Sampling
from .engine import Engine, EngineError, Held


@dataclasses.dataclass
class _Asked:
    """A rollout that was asked for; `result` reads answers until it is there."""

    engine: "ProcessEngine"
    prompts: Prompts
    sampling: Sampling
    message: Sample
    version: int
    rollout: Rollout | None = None

    def result(self) -> Rollout:
        while self.rollout is None:
            self.engine._advance()
        return self.rollout


@dataclasses.dataclass(eq=False)
class ProcessEngine(Engine):
    """What all of them share; each says which program to run, and with which options.

    Weights are written into memory that both processes map, once for every policy that samples; the
    channel carries token ids and log-probs only. A process that dies is started again, given the
    weights that it was given last, and asked again for all that it owes; such rollouts say the
    version of those weights.

    Attributes:
        environment: variables for the process, on top of this one's; for instance the chips it may
            use, `{"TPU_VISIBLE_CHIPS": "4,5,6,7"}`.
        start_timeout: seconds that it may take to load.
        timeout: seconds that a rollout may take.
        restarts: how often in a row it is started again, before that is an error.
    """

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True)
    start_timeout: float = dataclasses.field(default=300.0, kw_only=True)
    timeout: float = dataclasses.field(default=1800.0, kw_only=True)
    restarts: int = dataclasses.field(default=1, kw_only=True)

    name: ClassVar[str]
    module: ClassVar[str]

    def __post_init__(self) -> None:
        self._process: Process | None = None
        self._memory: SharedMemory | None = None
        self._load: Load | None = None
        self._held = Held()
        self._version = 0
        self._deaths = 0
        # What was sent and is not answered yet, oldest first.
        self._owed: collections.deque[_Asked | Push] = collections.deque()

    # --- what a kind of engine says ---

    @abc.abstractmethod
    def python(self) -> str:
        """The interpreter that runs it.

        Raises:
            ValueError: if there is none, with the command that makes one.
        """

    def variables(self) -> dict[str, str]:
        """Of its environment, on top of this process's."""
        return dict(self.environment)

    def options(self, policy: Transformer) -> dict[str, Any]:
        """What the program is told when it loads; JSON."""
        return {}

    def prepared(self, policy: Transformer) -> Transformer:
        """The policy as the program wants it."""
        return policy

    # --- Engine ---

    def start(self, policy: Transformer) -> None:
        """See `Engine`.

        Raises:
            EngineError: if it does not start.
        """
        self._give(policy, self._version)
        while any(isinstance(x, Push) for x in self._owed):
            self._advance()

    def submit(
        self,
        policy: Transformer,
        prompts: Prompts,
        sampling: Sampling,
        *,
        key: PRNGKeyArray,
        version: int = 0,
    ) -> _Asked:
        """See `Engine`."""
        self._give(policy, version)
        message = Sample(
            tokens=np.asarray(prompts.tokens),
            positions=np.asarray(prompts.positions),
            ids=np.asarray(prompts.ids),
            key=np.asarray(jr.key_data(key)),
            key_type=str(jr.key_impl(key)),
            seeds=seeds(prompts, sampling, key),
            samples=sampling.samples,
            max_tokens=sampling.max_tokens,
            stop_ids=list(sampling.stop_ids),
            temperature=float(sampling.temperature),
        )
        asked = _Asked(self, prompts, sampling, message, version)
        self._send(asked)
        return asked

    def close(self) -> None:
        """See `Engine`. What it still owes can no longer be read."""
        if self._process is not None:
            self._process.close()
        if self._memory is not None:
            self._memory.close()
        self._process = self._memory = self._load = None
        self._held.drop()
        self._owed.clear()

    # --- messages ---

    def _give(self, policy: Transformer, version: int) -> None:
        """Starts it if need be, and gives it the policy's weights if it has others."""
        if self._process is not None and self._held.are(policy):
            self._version = version
            return
        own = self.prepared(policy)
        if self._load is not None and self._load.config != own.architecture.to_config():
            raise ValueError(
                f"policy: the {self.name} engine was started for another architecture; close() it "
                "first, or start a second one"
            )
        if self._process is None:
            self._begin(own)
        # It reads the memory when it comes to the message; until then the last weights stay there.
        while any(isinstance(x, Push) for x in self._owed):
            self._advance()
        assert self._memory is not None and self._load is not None
        for array, leaf in zip(self._load.arrays, jax.tree.leaves(own), strict=True):
            _view(Array(**array), self._memory)[...] = np.asarray(leaf)
        self._held.take(policy)
        self._version = version
        self._send(Push())

    def _begin(self, policy: Transformer) -> None:
        arrays, size = _laid_out(policy)
        self._load = Load(
            policy.architecture.to_config(),
            [dataclasses.asdict(array) for array in arrays],
            size,
            self.options(policy),
        )
        self._memory = SharedMemory(size)
        self._open()

    def _open(self) -> None:
        """A new process, loaded."""
        assert self._memory is not None and self._load is not None
        self._process = Process(
            self.name, self.python(), self.module, self._memory, self.variables()
        )
        try:
            self._process.send(self._load)
            self._done(self._process.answer(self.start_timeout))
        except BaseException:
            self.close()
            raise

    def _send(self, what: "_Asked | Push") -> None:
        self._owed.append(what)
        assert self._process is not None
        try:
            self._process.send(what.message if isinstance(what, _Asked) else what)
        except EngineError as error:
            self._again(error)

    def _advance(self) -> None:
        """Waits for the oldest answer."""
        if self._process is None:
            raise EngineError(f"the {self.name} engine was closed before it had answered")
        try:
            answer = self._process.answer(self.timeout)
        except EngineError as error:
            self._again(error)
            return
        what = self._owed.popleft()
        if isinstance(what, Push):
            self._done(answer)
            return
        if not isinstance(answer, Completions):
            self._refuse(answer)
        self._deaths = 0
        what.rollout = to_rollout(what.prompts, what.sampling, _split(answer, what.version))

    def _again(self, error: EngineError) -> None:
        """After a death: another process, which is told all that this one had been told."""
        if not self._process or not self._process.dead or self._deaths >= self.restarts:
            self.close()
            raise error
        self._deaths += 1
        print(f"{error}; it is started again", file=sys.stderr)
        self._process.close()
        self._open()
        owed = [x for x in self._owed if isinstance(x, _Asked)]
        self._owed.clear()
        self._send(Push())
        for asked in owed:
            asked.version = self._version
            self._send(asked)

    def _done(self, answer: Message) -> None:
        if not isinstance(answer, Done):
            self._refuse(answer)

    def _refuse(self, answer: Message) -> NoReturn:
        self.close()
        why = answer.why if isinstance(answer, Failed) else f"answered {type(answer).__name__}"
        raise EngineError(f"the {self.name} engine failed: {why}")


def _laid_out(policy: Transformer) -> tuple[list[Array], int]:
    """Where each array lies in shared memory, and how much of it there is."""
    arrays, offset = [], 0
    for entry, leaf in zip(entries(policy.architecture), jax.tree.leaves(policy), strict=True):
        arrays.append(Array(list(entry.names), list(leaf.shape), str(leaf.dtype), offset))
        offset += -(-leaf.nbytes // 64) * 64
    return arrays, offset


def _view(array: Array, memory: SharedMemory) -> np.ndarray:
    return np.ndarray(array.shape, np.dtype(array.dtype), memory.map, array.offset)


def _split(answer: Completions, version: int) -> list[Completion]:
    return [
        Completion(tokens[:length], logprobs[:length], bool(stopped), version)
        for tokens, logprobs, length, stopped in zip(
            answer.tokens, answer.logprobs, answer.lengths, answer.stopped, strict=True
        )
    ]
