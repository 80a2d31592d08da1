"""Engines: samplers with a copy of the policy of their own, beside the one in training."""

import abc
import dataclasses
import weakref
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer
from .base import Sampler, Sampling


@runtime_checkable
class Pending(Protocol):
    """A rollout that was asked for."""

    def result(self) -> Rollout:
        """Waits for it. Its `version` says which policy sampled each row."""
        ...


class EngineError(RuntimeError):
    """An engine died, hung, or said something that breaks the contract; what and where to look."""


class Engine(abc.ABC):
    """A sampler that holds a copy of the policy, in another process or on another machine.

    What `submit` asks for is answered in order: weights given with a request are those that sample
    it, whatever is submitted afterwards. So `N` requests under way are `N` policies old at most,
    and which policy sampled what does not depend on time.
    """

    def __call__(
        self, policy: Transformer, prompts: Prompts, sampling: Sampling, *, key: PRNGKeyArray
    ) -> Rollout:
        """See `Sampler`."""
        return self.submit(policy, prompts, sampling, key=key).result()

    @abc.abstractmethod
    def submit(
        self,
        policy: Transformer,
        prompts: Prompts,
        sampling: Sampling,
        *,
        key: PRNGKeyArray,
        version: int | None = None,
    ) -> Pending:
        """Asks for a rollout and returns; the engine works on it while the caller trains.

        Args:
            policy: samples it. Its weights are taken before this returns, if the engine does not
                hold them already, so they may be donated afterwards.
            prompts: as for any sampler.
            sampling: likewise.
            key: likewise.
            version: of the policy; the rollout says it of each row. By default that with which
                these weights were given before, or 0.
        """

    @abc.abstractmethod
    def start(self, policy: Transformer) -> None:
        """Starts it and gives it the weights, so that what cannot work is known early.

        `submit` does the same when nobody did before.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends it, and all that belongs to it. The next use starts it anew."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass
class Ready:
    """A rollout that is there."""

    rollout: Rollout

    def result(self) -> Rollout:
        return self.rollout


def submit(
    sampler: Sampler,
    policy: Transformer,
    prompts: Prompts,
    sampling: Sampling,
    *,
    key: PRNGKeyArray,
    version: int | None = None,
) -> Pending:
    """`Engine.submit` for any sampler; one without an engine samples at once.

    Args:
        sampler: samples.
        policy: as for `Engine.submit`.
        prompts: likewise.
        sampling: likewise.
        key: likewise.
        version: likewise.
    """
    if isinstance(sampler, Engine):
        return sampler.submit(policy, prompts, sampling, key=key, version=version)
    rollout = sampler(policy, prompts, sampling, key=key)
    versions = jnp.full(rollout.group.shape, version or 0, jnp.int32)
    return Ready(dataclasses.replace(rollout, version=versions))


def engine_of(sampler: Sampler) -> Engine | None:
    """The engine that samples in the end, if one does: a wrapper calls what it wraps `sampler`."""
    while not isinstance(sampler, Engine):
        sampler = getattr(sampler, "sampler", None)  # pyright: ignore[reportAssignmentType]
        if sampler is None:
            return None
    return sampler


class Held:
    """Which weights an engine holds: those of the very arrays that were given last."""

    def __init__(self) -> None:
        self._leaves: list[Callable[[], object]] = []

    def are(self, policy: Transformer) -> bool:
        """Whether the policy's arrays are the ones held."""
        leaves = jax.tree.leaves(policy)
        # A weak reference to an array that is gone gives None, which no array is.
        return len(leaves) == len(self._leaves) and all(
            held() is leaf for held, leaf in zip(self._leaves, leaves, strict=True)
        )

    def take(self, policy: Transformer) -> None:
        """From now on these."""
        self._leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(policy)]

    def drop(self) -> None:
        """None any more."""
        self._leaves = []
