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
class Asked:
    """A rollout that was asked for; `result` reads answers until it is there."""

    engine: "ProcessEngine"
    prompts: Prompts
    sampling: Sampling
    message: Sample
    version: int
    rollout: Rollout | None = None
    lost: bool = False  # the engine was closed

    def result(self) -> Rollout:
        while self.rollout is None:
            if self.lost:
                raise EngineError(
                    f"the {self.engine.name} engine was closed before it had answered"
                )
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
        facts: what the program said when it had loaded.

    Raises:
        ValueError: if an option cannot be right.
    """

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True)
    start_timeout: float = dataclasses.field(default=300.0, kw_only=True)
    timeout: float = dataclasses.field(default=1800.0, kw_only=True)
    restarts: int = dataclasses.field(default=1, kw_only=True)

    name: ClassVar[str]
    module: ClassVar[str]

    def __post_init__(self) -> None:
        for option in ("start_timeout", "timeout"):
            value = getattr(self, option)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{option}={value!r} must be seconds above 0")
        if not isinstance(self.restarts, int) or self.restarts < 0:
            raise ValueError(f"restarts={self.restarts!r} must be a number from 0")
        if not isinstance(self.environment, Mapping) or not all(
            isinstance(x, str) for pair in self.environment.items() for x in pair
        ):
            raise ValueError(
                f"environment={self.environment!r} must map strings to strings, as in "
                "{'JAX_PLATFORMS': 'cpu'}"
            )
        self.facts: dict[str, Any] = {}
        self._process: Process | None = None
        self._memory: SharedMemory | None = None
        self._load: Load | None = None
        self._held = Held()
        self._version = 0
        self._pushes = 0
        self._deaths = 0
        # What was sent and is not answered yet, oldest first.
        self._owed: collections.deque[Asked | Push] = collections.deque()

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

    def admit(self, prompts: Prompts, sampling: Sampling) -> None:
        """Refuses what the program cannot serve, before it is asked.

        Raises:
            EngineError: with the option to change.
        """

    def compare(self, policy: Transformer, asked: Asked) -> None:
        """Looks at what was asked for while the policy still has its weights.

        Raises:
            EngineError: if it is not what the policy says.
        """

    # --- Engine ---

    def start(self, policy: Transformer) -> None:
        """See `Engine`.

        Raises:
            EngineError: if it does not start.
        """
        self._give(policy, None)
        while any(isinstance(x, Push) for x in self._owed):
            self._advance()

    def submit(
        self,
        policy: Transformer,
        prompts: Prompts,
        sampling: Sampling,
        *,
        key: PRNGKeyArray,
        version: int | None = None,
    ) -> Asked:
        """See `Engine`."""
        self.admit(prompts, sampling)
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
        asked = Asked(self, prompts, sampling, message, self._version)
        self._send(asked)
        try:
            self.compare(policy, asked)
        except EngineError:
            self.close()
            raise
        return asked

    def close(self) -> None:
        """See `Engine`. What it still owes can no longer be read."""
        if self._process is not None:
            self._process.close()
        if self._memory is not None:
            self._memory.close()
        for asked in self._owed:
            if isinstance(asked, Asked):
                asked.lost = True
        self._process = self._memory = self._load = None
        self._held.drop()
        self._owed.clear()
        self._version = self._pushes = self._deaths = 0

    # --- messages ---

    def _give(self, policy: Transformer, version: int | None) -> None:
        """Starts it if need be, and gives it the policy's weights if it has others."""
        if self._process is not None and self._held.are(policy):
            self._version = self._version if version is None else version
            return
        own = self.prepared(policy)
        arrays, size = _laid_out(own)
        if self._process is None:
            self._begin(own, arrays, size)
        assert self._load is not None
        config = own.architecture.to_config()
        if (self._load.config, self._load.arrays) != (config, list(map(_as_dict, arrays))):
            raise ValueError(
                f"policy: the {self.name} engine was started for another architecture or dtype; "
                "close() it first, or start a second one"
            )
        # It reads the memory when it comes to the message; until then the last weights stay there.
        while any(isinstance(x, Push) for x in self._owed):
            self._advance()
        assert self._memory is not None
        for array, leaf in zip(arrays, jax.tree.leaves(own), strict=True):
            _write(leaf, _view(array, self._memory))
        self._held.take(policy)
        self._version = self._version if version is None else version
        self._pushes += 1
        self._send(Push())

    def _begin(self, policy: Transformer, arrays: list[Array], size: int) -> None:
        config = policy.architecture.to_config()
        self._load = Load(config, list(map(_as_dict, arrays)), size, self.options(policy))
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
            self.facts = self._done(self._process.answer(self.start_timeout)).facts
        except BaseException:
            self.close()
            raise

    def _send(self, what: "Asked | Push") -> None:
        self._owed.append(what)
        assert self._process is not None
        self._process.send(what.message if isinstance(what, Asked) else what)

    def _advance(self) -> None:
        """Waits for the oldest answer."""
        assert self._process is not None
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
        owed = [x for x in self._owed if isinstance(x, Asked)]
        self._owed.clear()
        self._send(Push())
        for asked in owed:
            asked.version = self._version
            self._send(asked)

    def _done(self, answer: Message) -> Done:
        if not isinstance(answer, Done):
            self._refuse(answer)
        return answer

    def _refuse(self, answer: Message) -> NoReturn:
        assert self._process is not None
        self._process.last_words()  # keeps the log, which has the traceback
        why = answer.why if isinstance(answer, Failed) else f"answered {type(answer).__name__}"
        error = EngineError(f"the {self.name} engine failed: {why}; its log is {self._process.log}")
        self.close()
        raise error


def _laid_out(policy: Transformer) -> tuple[list[Array], int]:
    """Where each array lies in shared memory, and how much of it there is."""
    arrays, offset = [], 0
    for entry, leaf in zip(entries(policy.architecture), jax.tree.leaves(policy), strict=True):
        arrays.append(Array(list(entry.names), list(leaf.shape), str(leaf.dtype), offset))
        offset += -(-leaf.nbytes // 64) * 64
    return arrays, offset


def _as_dict(array: Array) -> dict[str, Any]:
    return dataclasses.asdict(array)


def _write(leaf: Any, into: np.ndarray) -> None:
    """Copies an array shard by shard: as a whole it would keep a copy of itself on the host."""
    if not isinstance(leaf, jax.Array):
        into[...] = leaf
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            into[shard.index] = np.asarray(shard.data)


def _view(array: Array, memory: SharedMemory) -> np.ndarray:
    return np.ndarray(array.shape, np.dtype(array.dtype), memory.map, array.offset)


def _split(answer: Completions, version: int) -> list[Completion]:
    return [
        Completion(tokens[:length], logprobs[:length], bool(stopped), version)
        for tokens, logprobs, length, stopped in zip(
            answer.tokens, answer.logprobs, answer.lengths, answer.stopped, strict=True
        )
    ]
