"""Asking a sampler for rollouts: in passes, on the meshes, and ahead of the training.

`ask` is what training and evaluation share. `Ahead` keeps the batches of the next steps under way
while the current one trains (`--rollout.overlap`).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from layout import Meshes, from_sampling, key_to_sample, set_mesh
from spread import padded, spread, whole

import eqrl
from eqrl import models, samplers


class Asked(NamedTuple):
    """A rollout that was asked for.

    Attributes:
        parts: one a pass, each with the rows of `size` prompts.
        size: prompts a pass.
        count: prompts altogether.
        meshes: where it is sampled and wanted.
    """

    parts: list[samplers.Pending]
    size: int
    count: int
    meshes: Meshes

    def result(self) -> eqrl.Rollout:
        """Waits for it."""
        found = []
        for start, part in zip(range(0, self.count, self.size), self.parts, strict=True):
            rollout = from_sampling(whole(part.result(), self.meshes.sample), self.meshes)
            first = start * rollout.group.shape[0] // self.size
            found.append(dataclasses.replace(rollout, group=rollout.group + first))
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *found)
        rows = self.count * joined.group.shape[0] // (len(found) * self.size)
        return jax.tree.map(lambda x: x[:rows], joined)


def ask(
    sampler: samplers.Sampler,
    policy: models.Transformer,
    prompts: eqrl.Prompts,
    sampling: samplers.Sampling,
    *,
    key: PRNGKeyArray,
    size: int,
    meshes: Meshes,
    version: int,
) -> Asked:
    """Asks for completions of all prompts, `size` prompts a pass.

    A completion depends on its prompt's id and not on its neighbours, so passes change memory only.

    Args:
        sampler: samples.
        policy: as the sampler wants it; see `layout.to_sample`.
        prompts: whole in every process.
        sampling: for the sampler.
        key: likewise.
        size: prompts a pass, padded to the mesh.
        meshes: of the run. An engine has its own device.
        version: of the policy.
    """
    if samplers.engine_of(sampler) is not None:
        meshes = Meshes()
    mesh, key = meshes.sample, key_to_sample(key, meshes)
    count, size = len(prompts.ids), padded(size, mesh)
    parts = []
    for start in range(0, count, size):
        # A last pass that is short repeats the last prompt: all passes are one program.
        index = np.minimum(np.arange(start, start + size), count - 1)
        some = spread(jax.tree.map(lambda x, i=index: x[i], prompts), mesh)
        with set_mesh(mesh):
            parts.append(samplers.submit(sampler, policy, some, sampling, key=key, version=version))
    return Asked(parts, size, count, meshes)


class Batch(NamedTuple):
    """The prompts of one round of a step, and their rollout to come."""

    rows: list[int]
    prompts: eqrl.Prompts
    asked: Asked


class Ahead:
    """The batches that were asked for before their step, oldest first.

    Args:
        size: how many there may be: 0 is strictly on-policy.
        last: the step after the last one.
        rows: of the problems that were asked for before a restart; they are asked for again.
    """

    def __init__(self, size: int, last: int, rows: Iterable[list[int]] = ()):
        self._size, self._last = size, last
        self._again = collections.deque(rows)
        self._batches: collections.deque[Batch] = collections.deque()

    def take(self, step: int, ask: Callable[[int, list[int] | None], Batch]) -> Batch:
        """The batch of this step, after asking for those that may be under way beside it.

        Args:
            step: counted from 0.
            ask: from a step, and its rows if they are known already, to its batch under way.
        """
        while len(self._batches) <= min(self._size, self._last - step - 1):
            rows = self._again.popleft() if self._again else None
            self._batches.append(ask(step + len(self._batches), rows))
        return self._batches.popleft()

    def rows(self) -> list[list[int]]:
        """The problems of what is under way, for a checkpoint."""
        return [batch.rows for batch in self._batches] + list(self._again)
