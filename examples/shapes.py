"""A run as shapes that know where they would lie: what `planning.py` compiles programs for."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from backends import build_backend
from build import plugin_builders
from config import Config, batch_plan, build_algorithm, build_optimizer, derived, required
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from layout import Meshes, choose_meshes, state_shapes

import eqrl
from eqrl import models, samplers, sharding
from eqrl.sharding import plan as planner


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The run.

    Attributes:
        config: resolved.
        topology: the devices.
        meshes: of training and of sampling.
        architecture: of the model.
        algorithm: to train with.
        optimizer: likewise.
        state: policy, critic and optimizer.
        reference: the frozen policy, if the algorithm reads it.
    """

    config: Config
    topology: planner.Topology
    meshes: Meshes
    architecture: models.Architecture
    algorithm: eqrl.Algorithm
    optimizer: optax.GradientTransformation
    state: eqrl.TrainState
    reference: models.Transformer | None

    @property
    def mesh(self) -> Mesh:
        """Of training."""
        assert self.meshes.train is not None
        return self.meshes.train

    @property
    def sampling_mesh(self) -> Mesh:
        """How weights lie while sampling."""
        assert self.meshes.sample is not None
        return self.meshes.sample

    @property
    def samples_here(self) -> bool:
        """Whether the trainer's devices sample; an engine has its own."""
        plugins = plugin_builders(self.config.plugins)
        return samplers.engine_of(build_backend(self.config.rollout.backend, plugins)) is None

    @property
    def moved(self) -> bool:
        """Whether sampling has a copy of the weights in a layout of its own."""
        return self.samples_here and self.sampling_mesh != self.mesh

    @property
    def held(self) -> int:
        """Bytes on one device that stay from step to step."""
        return sharding.device_bytes((self.state, self.reference))

    @property
    def pass_prompts(self) -> int:
        """Prompts of a call of the sampler, after padding them to the mesh."""
        shards = sharding.row_shards(self.sampling_mesh)
        return -(-batch_plan(self.config).prompts_per_pass // shards) * shards

    @property
    def micro_rows(self) -> int:
        """Rows of a device in a backward pass."""
        shards = sharding.row_shards(self.mesh)
        return batch_plan(self.config, row_shards=shards).micro_batch_sequences_per_device

    @property
    def required(self) -> frozenset[str]:
        """What the trainer's own forward passes give before the update."""
        return required(self.config, self.algorithm) & eqrl.ANNOTATED

    def buffer(self, micro: int) -> int:
        """Trained tokens of a micro-batch if no completion stops before its time."""
        return micro * sharding.row_shards(self.mesh) * self.config.rollout.max_tokens

    def sampling(self, max_tokens: int) -> samplers.Sampling:
        """The run's, but for the stop token: a constant of the checkpoint, which is not here."""
        rollout = self.config.rollout
        return samplers.Sampling(rollout.samples, max_tokens, (0,), rollout.temperature)

    def prompts(self, count: int, mesh: Mesh) -> eqrl.Prompts:
        """So many prompts, all of the greatest width."""
        one = eqx.filter_eval_shape(
            eqrl.pad_prompts, [[0] * self.config.data.max_prompt_tokens], [0], step=1
        )
        return _over_rows(one, mesh, count)

    def rollout(self) -> eqrl.Rollout:
        """All sequences of a step, each as long as can be."""
        sampling = self.sampling(self.config.rollout.max_tokens)

        def make(policy, prompts, key):
            rollout = samplers.Decoder()(policy, prompts, sampling, key=key)
            count = rollout.tokens.shape[0]
            return dataclasses.replace(
                rollout,
                rewards=jnp.zeros((count, 1), jnp.float32),
                greedy_rewards=jnp.zeros((count,), jnp.float32),
                version=jnp.zeros((count,), jnp.int32),
            )

        prompts = self.prompts(self.config.rollout.prompts, self.mesh)
        found = eqx.filter_eval_shape(make, self.state.policy, prompts, key_on(self.mesh))
        return _over_rows(found, self.mesh)

    def minibatch(self) -> eqrl.Batch:
        """What one update is given, padded to the mesh."""

        def make(state, rollout):
            like = rollout.logprobs
            rollout = dataclasses.replace(rollout, **dict.fromkeys(self.required, like))
            return self.algorithm.assign(like, state, rollout)[0]

        found = eqx.filter_eval_shape(make, self.state.algorithm, self.rollout())
        return _over_rows(found, self.mesh, batch_plan(self.config).minibatch_sequences)

    def cut(self, mesh: Mesh) -> PyTree:
        """How the policy's arrays lie on a mesh."""
        return sharding.shardings(self.state.policy, mesh, self.architecture)


def shapes_of(config: Config, topology, architecture: models.Architecture) -> Shapes:
    """The run on the devices of a topology; no array is made."""
    algorithm = build_algorithm(config)
    optimizer = build_optimizer(config, derived(config)["updates"])
    policy = models.abstract(architecture, jnp.dtype(config.dtype))
    state, reference = state_shapes(policy, algorithm, optimizer)
    devices = topology.devices
    if config.mesh is None and config.plan == "here":
        # As the run would.
        devices, config = devices[:1], dataclasses.replace(config, mesh="data=1")
    capacity = topology.chip.hbm_bytes
    meshes = choose_meshes(config, policy, (state, reference), devices, capacity)
    assert meshes.train is not None
    lay = functools.partial(sharding.abstract, mesh=meshes.train, architecture=architecture)
    return Shapes(
        config=config,
        topology=topology,
        meshes=meshes,
        architecture=architecture,
        algorithm=algorithm,
        optimizer=optimizer,
        state=lay(state),
        reference=lay(reference),
    )


def key_on(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key, the same on every device."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _over_rows(tree: Any, mesh: Mesh, count: int | None = None) -> Any:
    """The shapes with their rows, or `count` of them, over the mesh, after padding them to it."""
    shards = sharding.row_shards(mesh)
    where = NamedSharding(mesh, PartitionSpec(sharding.ROWS))

    def one(x):
        rows = x.shape[0] if count is None else count
        shape = (-(-rows // shards) * shards, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

    return jax.tree.map(one, tree)
