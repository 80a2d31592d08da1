"""Training states are made in their shards; and states of shapes that know where they would lie."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import eqrl
from eqrl import algorithms, models, sharding
from eqrl.sharding.create import _program


MESHES = ("fsdp=8", "fsdp=4,tensor=2")
FACTS = models.Architecture(
    "qwen2", 512, 64, 2, 8, 8, 8, 256, tied=False, attention_bias=True
)  # fmt: skip


def _state(policy, optimizer):
    critic = models.ValueModel.init(policy)
    return eqrl.init(policy, algorithms.ppo(), optimizer, critic=critic)


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def policy():
    return models.Transformer.init(FACTS, key=jax.random.key(0))


@pytest.mark.parametrize("axes", MESHES)
def test_a_state_is_what_place_makes_of_it(policy, axes):
    mesh = sharding.make_mesh(axes)
    optimizer = optax.adamw(1e-3)
    here = sharding.place(policy, mesh, FACTS)
    state = sharding.create(lambda: _state(here, optimizer), mesh, FACTS)
    wanted = sharding.place(_state(policy, optimizer), mesh, FACTS)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert eqx.tree_equal(jax.device_get(state), jax.device_get(wanted))
    for got, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.sharding.is_equivalent_to(like.sharding, got.ndim)


def test_nothing_of_a_state_is_ever_whole(policy):
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    optimizer = optax.adamw(1e-3)
    here = sharding.place(policy, mesh, FACTS)
    program, arguments, _ = _program(lambda: _state(here, optimizer), mesh, FACTS)
    used = program.lower(arguments).compile().memory_analysis()
    assert used is not None
    whole = _bytes(eqx.filter(_state(policy, optimizer), eqx.is_array))
    # The policy is the argument; the state has a copy of it, the critic, and two moments of each.
    # Norms and biases, which are whole everywhere, are some percent of so narrow a model.
    share = (whole + _bytes(policy)) / 8
    sizes = (used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes)
    print("share", share, "argument, output, temporary bytes of a device", sizes)
    assert 0.95 * share < sum(sizes) < 1.1 * share
    state = program(arguments)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        spec = sharding.partition_spec(path, leaf.shape, mesh, FACTS)
        cut = int(np.prod([mesh.shape[axis] for axis in spec if axis]))
        assert leaf.addressable_shards[0].data.size == leaf.size // cut


def test_what_was_closed_over_stays_valid(policy):
    mesh = sharding.make_mesh("fsdp=8")
    here = sharding.place(policy, mesh, FACTS)
    state = sharding.create(lambda: _state(here, optax.sgd(0.1)), mesh, FACTS)
    own = {x.unsafe_buffer_pointer() for x in _buffers(here)}
    assert not own & {x.unsafe_buffer_pointer() for x in _buffers(state)}
    taken = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert eqx.tree_equal(jax.device_get(here), jax.device_get(policy))
    np.testing.assert_array_equal(np.asarray(taken.policy.norm), np.asarray(policy.norm) + 1)


def _buffers(tree):
    arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    return [shard.data for x in arrays for shard in x.addressable_shards]


def test_random_models_and_what_is_no_array():
    mesh = sharding.make_mesh("fsdp=8")

    def make():
        model = models.Transformer.init(FACTS, key=jax.random.key(3))
        return {"model": model, "call": jnp.sum, "number": 2.5, "none": None}

    made = sharding.create(make, mesh, FACTS)
    assert (made["call"], made["number"], made["none"]) == (jnp.sum, 2.5, None)
    assert made["model"].architecture == FACTS
    assert made["model"].embedding.sharding.spec == PartitionSpec("tensor", "fsdp")
    # The order in which the compiler rounds may differ in the last place.
    plain = models.Transformer.init(FACTS, key=jax.random.key(3))
    for a, b in zip(jax.tree.leaves(made["model"]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-8)


# --- shapes alone ---------------------------------------------------------------------------------


def test_shapes_of_a_state_with_where_they_would_lie(policy):
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    optimizer = optax.adamw(1e-3)
    shapes = eqx.filter_eval_shape(lambda p: _state(p, optimizer), models.abstract(FACTS))
    found = sharding.abstract(shapes, mesh, FACTS)
    real = sharding.place(_state(policy, optimizer), mesh, FACTS)
    assert sharding.shardings(found, mesh, FACTS) == sharding.shardings(real, mesh, FACTS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    mixed = sharding.abstract({"x": jnp.zeros(3), "y": 1.5}, mesh, FACTS)
    assert mixed["y"] == 1.5 and mixed["x"].sharding.spec == PartitionSpec()


def test_seventy_billion_parameters_cost_nothing():
    facts = models.known("meta-llama/Llama-3.3-70B-Instruct")
    mesh = sharding.make_mesh("fsdp=8")
    model = sharding.abstract(models.abstract(facts, jnp.bfloat16), mesh, facts)
    share = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(model)
    )
    assert share == pytest.approx(_bytes(model) / 8, rel=1e-3)
