"""Which mesh trains, which mesh samples, and which log-probs fit them."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from config import Config, batch_plan
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

import eqrl
from eqrl import models, samplers, sharding


class Meshes(NamedTuple):
    """Where a run's arrays lie; `None` is one device.

    Attributes:
        train: of state, batch, log-probs and update.
        sample: of weights and caches while sampling.
        why: of `train`, if it was chosen.
    """

    train: Mesh | None = None
    sample: Mesh | None = None
    why: str = ""


# Of a device's memory, what training state and weights for sampling may take together; caches and
# activations want the rest.
SHARE = 0.75


def implementation_for(config: Config, mesh: Mesh | None, platform: str) -> eqrl.logprobs.LogProbs:
    """The log-probs that `--policy-loss-impl` names, if they can run there, over the mesh.

    Raises:
        ValueError: if they cannot.
    """
    name = config.policy_loss_impl
    given = {"auto": None, "jax": "chunked"}.get(name, name)
    try:
        implementation = eqrl.logprobs.choose(given, platform)
    except ValueError as error:
        raise ValueError(f"--policy-loss-impl {name}: {error}") from None
    if mesh is None or implementation is eqrl.logprobs.reference:
        return implementation
    return eqrl.logprobs.over_mesh(mesh, implementation=implementation)


def set_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Activations are cut over this mesh in here."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_sample(
    policy: models.Transformer, meshes: Meshes, sampler: samplers.Sampler
) -> models.Transformer:
    """The policy's weights as sampling wants them; drop them before the next update."""
    if samplers.engine_of(sampler) is not None:  # it has its own
        return policy
    if meshes.sample is None or meshes.sample == meshes.train:
        return policy
    return sharding.reshard(policy, meshes.sample, policy.architecture)


def key_to_sample(key: PRNGKeyArray, meshes: Meshes) -> PRNGKeyArray:
    """The key for programs of the sampling mesh: one made under another mesh belongs to that."""
    if meshes.sample is None or meshes.sample == meshes.train:
        return key
    with set_mesh(meshes.sample):
        return jr.wrap_key_data(jnp.asarray(np.asarray(jr.key_data(key))))


def from_sampling(tree: PyTree, meshes: Meshes) -> PyTree:
    """What was sampled, whole on every device of the training mesh; it is small."""
    if meshes.sample is None or meshes.sample == meshes.train or meshes.train is None:
        return tree
    return jax.device_put(tree, NamedSharding(meshes.train, PartitionSpec()))


def state_shapes(
    policy: models.Transformer,
    algorithm: eqrl.Algorithm,
    optimizer: optax.GradientTransformation,
) -> tuple[eqrl.TrainState, models.Transformer | None]:
    """Training state and frozen reference as shapes, from a model or its shapes."""
    critic = None
    if "values" in algorithm.requires:
        critic = eqx.filter_eval_shape(models.ValueModel.init, policy)
    state = eqx.filter_eval_shape(
        lambda policy, critic: eqrl.init(policy, algorithm, optimizer, critic=critic),
        policy,
        critic,
    )
    return state, policy if "ref_logprobs" in algorithm.requires else None


def stated_mesh(config: Config) -> Mesh | None:
    """The mesh that trains, if the command line says it; all devices must be there."""
    axes = (config.mesh or "auto").partition("/")[0]
    return None if axes == "auto" else sharding.make_mesh(axes)


def choose_meshes(
    config: Config,
    policy: models.Transformer,
    state: PyTree,
    devices: Sequence[Any],
    capacity: int | None,
) -> Meshes:
    """The meshes of `--mesh`, from the shapes of a model and its training state.

    Args:
        config: resolved, with a mesh.
        policy: the model or its shapes.
        state: all that stays while training, or its shapes.
        devices: all there are.
        capacity: bytes of one device's memory, if known.

    Raises:
        ValueError: if a mesh does not fit the devices.
    """
    axes, _, sampling = (config.mesh or "auto").partition("/")
    if axes == "auto":
        train, why = _cheapest(config, policy, state, devices, capacity)
    else:
        train, why = sharding.make_mesh(axes, devices), ""
    if sampling:
        return Meshes(train, sharding.make_mesh(sampling, devices), why)
    return Meshes(train, _sampling_mesh(train, policy, state, capacity), why)


def _cheapest(config: Config, policy, state, devices, capacity) -> tuple[Mesh, str]:
    batch = batch_plan(config)
    micro = batch.micro_batch_sequences
    if config.optim.micro_batch_per_device:
        micro = config.optim.micro_batch_per_device * len(devices)
    accumulated = -(-batch.minibatch_sequences // micro)
    length = config.data.max_prompt_tokens + config.rollout.max_tokens
    choices = sharding.mesh_choices(
        policy,
        state,
        devices=devices,
        capacity=capacity,
        row_units=(min(micro, batch.minibatch_sequences), batch.prompts_per_pass),
        update_tokens=batch.sequences_per_step * batch.epochs * length,
        micro_batches=accumulated * batch.updates_per_step,
    )
    best, others = choices[0], [c for c in choices[1:] if c.fits]
    why = f"mesh auto: {best}; the least sent of what fits"
    if not best.fits:
        why = f"mesh auto: {best}; nothing fits, and this holds the least"
    elif others:
        why += f", the next is {others[0]}"
    return best.mesh, why


def _sampling_mesh(mesh: Mesh, policy: models.Transformer, state, capacity: int | None) -> Mesh:
    """No weight is cut along `fsdp` while sampling, where a copy has room beside the state.

    What is gathered once a rollout need not be gathered for every token. `tensor` grows until it
    has room.
    """
    if mesh.shape["fsdp"] == 1:
        return mesh
    devices = list(mesh.devices.flat)
    on = lambda tree, mesh: sharding.device_bytes(  # noqa: E731
        sharding.abstract(tree, mesh, policy.architecture)
    )
    held = on(state, mesh)
    tensor = mesh.shape["tensor"]
    while len(devices) % tensor == 0 and policy.architecture.num_kv_heads % tensor == 0:
        found = sharding.make_mesh(f"data=-1,tensor={tensor}", devices)
        if capacity is None or held + on(policy, found) <= SHARE * capacity:
            return found
        tensor *= 2
    return mesh
