"""Eight devices in one process give the numbers of one, and hold an eighth each."""

import collections
import contextlib
import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import tiny_model

import eqrl
from eqrl import algorithms, logprobs, models, samplers, sharding
from eqrl.models import PARTITION, Architecture, Transformer


# Not Adam: where a gradient is 0 but for rounding, its step is a coin toss of full size.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9))


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ("fsdp=-1", (1, 8, 1)),
        ("data=2,fsdp=4", (2, 4, 1)),
        ("tensor=2, fsdp=-1", (1, 4, 2)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
    ],
)
def test_mesh_from_words(axes, sizes):
    mesh = sharding.make_mesh(axes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert sharding.row_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ("data=3", "has 3 devices, and there are 8"),
        ("data=3,fsdp=-1", "has 3 devices or a multiple, and there are 8"),
        ("batch=8", "'batch=8' must be one of data, fsdp, tensor"),
        ("data=2,data=4", "each once"),
        ("fsdp=0", "size of fsdp must be above 0"),
        ("fsdp=-1,data=-1", "only one axis may be -1"),
        ("", "has 1 devices, and there are 8"),
    ],
)
def test_impossible_meshes_are_refused(axes, match):
    with pytest.raises(ValueError, match=match):
        sharding.make_mesh(axes)


# --- what lies where ------------------------------------------------------------------------------


def architecture(**changes) -> Architecture:
    facts = {
        "family": "qwen2",
        "vocab_size": 64,
        "width": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 4,
        "ff_width": 48,
        "tied": False,
        "attention_bias": True,
        "qk_norm": True,
    }
    return Architecture(**facts | changes)


def specs_of(model, axes):
    found = sharding.shardings(model, sharding.make_mesh(axes), model.architecture)
    return {
        ".".join(key.name for key in path): leaf.spec
        for path, leaf in jtu.tree_leaves_with_path(found)
    }


def test_every_array_of_the_family_is_in_the_table():
    facts = architecture(output_bias=True, mlp_bias=True)
    model = Transformer.init(facts, key=jax.random.key(0))
    for path, leaf in jtu.tree_leaves_with_path(model):
        name = ".".join(key.name for key in path)
        assert len(PARTITION[name]) == leaf.ndim, name
    assert specs_of(model, "fsdp=4,tensor=2") == {
        name: jax.sharding.PartitionSpec(*axes) for name, axes in PARTITION.items()
    }


def test_heads_are_never_cut_and_what_does_not_divide_is_whole():
    model = Transformer.init(architecture(num_kv_heads=2, ff_width=50), key=jax.random.key(0))
    specs = specs_of(model, "fsdp=2,tensor=4")
    assert specs["layers.key.weight"] == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert specs["layers.query.weight"] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert specs["layers.down.weight"] == jax.sharding.PartitionSpec(None, None, "fsdp")


def test_no_device_holds_more_than_its_share():
    model = Transformer.init(architecture(), key=jax.random.key(0))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    state = eqrl.init(model, algorithms.rloo(), OPTIMIZER)
    state = sharding.place(state, mesh, model.architecture)
    first = jax.devices()[0]
    here = total = 0
    for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        if leaf.ndim >= 2 and "norm" not in str(leaf):
            total += leaf.nbytes
            here += sum(s.data.nbytes for s in leaf.addressable_shards if s.device == first)
    assert here < total / 8 * 1.1


# --- one step -------------------------------------------------------------------------------------


def step(algorithm, axes, *, micro_batch=None, temperature=1.0):
    """Samples, scores, assigns and updates, on a mesh or on one device."""
    policy = tiny_model(vocab=40)
    critic = models.ValueModel.init(policy) if "values" in algorithm.requires else None
    state = eqrl.init(policy, algorithm, OPTIMIZER, critic=critic)
    rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13, 2], [5, 5, 5], [30], [21, 22]]
    prompts = eqrl.pad_prompts(rows, range(8), step=4)
    options: dict = {"micro_batch": micro_batch}
    context = contextlib.nullcontext()
    place = lambda tree: tree  # noqa: E731
    if axes is not None:
        mesh = sharding.make_mesh(axes)
        context = jax.set_mesh(mesh)
        place = lambda tree: sharding.place_rows(tree, mesh)  # noqa: E731
        state = sharding.place(state, mesh, policy.architecture)
        options["implementation"] = logprobs.over_mesh(mesh)
    sampling = samplers.Sampling(4, 6, (0, 1), temperature)
    with context:
        sampler = samplers.Decoder()
        rollout = place(sampler(state.policy, place(prompts), sampling, key=jax.random.key(5)))
        reward = jnp.sum(jnp.where(rollout.mask, rollout.tokens, 0), axis=1).astype(float) / 50
        rollout = dataclasses.replace(rollout, rewards=reward[:, None])
        needed = algorithm.requires | {"old_logprobs"}
        rollout = eqrl.annotate(
            rollout, needed, policy=state.policy, reference=state.policy, critic=state.critic,
            **options,
        )  # fmt: skip
        signal = eqrl.outcome(reward, rollout.mask)
        batch, estimators = jax.jit(algorithm.assign)(signal, state.algorithm, rollout)
        before = dataclasses.replace(state, algorithm=estimators)
        kept = jax.tree.map(lambda x: x.sharding, eqx.filter(before, eqx.is_array))
        state, metrics = eqrl.update(before, place(batch), algorithm, OPTIMIZER, **options)
    return rollout, batch, state, metrics, kept


@pytest.mark.parametrize(
    ("name", "axes", "micro_batch", "temperature"),
    [
        ("ppo", "data=2,fsdp=2,tensor=2", 8, 1.0),
        ("reinforce_pp", "fsdp=8", None, 1.0),
        ("grpo", "data=2,fsdp=4", 16, 0.0),
        ("rloo", "data=4,tensor=2", 8, 1.0),
    ],
)
def test_one_step_gives_the_numbers_of_one_device(name, axes, micro_batch, temperature):
    algorithm = getattr(algorithms, name)()
    options = {"micro_batch": micro_batch, "temperature": temperature}
    rollout, batch, state, metrics, _ = step(algorithm, None, **options)
    got_rollout, got_batch, got_state, got_metrics, kept = step(algorithm, axes, **options)
    np.testing.assert_array_equal(np.asarray(got_rollout.tokens), np.asarray(rollout.tokens))
    np.testing.assert_array_equal(np.asarray(got_rollout.mask), np.asarray(rollout.mask))
    np.testing.assert_allclose(
        np.asarray(got_batch.advantages), np.asarray(batch.advantages), atol=1e-6, rtol=1e-6
    )
    models_of = lambda s: eqx.filter((s.policy, s.critic), eqx.is_array)  # noqa: E731
    for a, b in zip(*(jax.tree.leaves(models_of(s)) for s in (got_state, state)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=1e-5)
    for key in metrics:
        np.testing.assert_allclose(
            float(got_metrics[key]), float(metrics[key]), atol=1e-5, rtol=1e-4, err_msg=key
        )
    # Else the next update would be compiled again, and a device would hold more than its share.
    after = jax.tree.map(lambda x: x.sharding, eqx.filter(got_state, eqx.is_array))
    same = jax.tree.map(lambda a, b: a.is_equivalent_to(b, 3), after.policy, kept.policy)
    assert all(jax.tree.leaves(same))


def test_weights_are_gathered_layer_by_layer():
    """Inside the scan over layers, one layer at a time: never the whole stack."""
    facts = architecture(num_layers=3, tied=True)
    mesh = sharding.make_mesh("fsdp=8")
    model = sharding.place(Transformer.init(facts, key=jax.random.key(0)), mesh, facts)
    tokens = sharding.place_rows(jnp.zeros((8, 5), jnp.int32), mesh)
    positions = sharding.place_rows(jnp.tile(jnp.arange(5), (8, 1)), mesh)

    def loss(model):
        return jnp.sum(model(tokens, positions) ** 2)

    with jax.set_mesh(mesh):
        text = str(jax.jit(jax.grad(loss)).lower(model).compile().as_text())
    gathered = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    }
    assert (1, facts.width, facts.ff_width) in gathered or (
        facts.width,
        facts.ff_width,
    ) in gathered, "no layer's weights are gathered"
    whole = [shape for shape in gathered if len(shape) == 3 and shape[0] == facts.num_layers]
    assert not whole, f"whole stacks are gathered: {whole}"


# --- what is sent ---------------------------------------------------------------------------------


def planned(function, args, mesh, **options):
    """The program's memory and exchanges, compiled for the eight devices and not run."""
    return sharding.plan.plan_program(
        "program", function, args, topology=sharding.plan.here(), mesh=mesh, **options
    )


def over_rows(tree, mesh):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.ROWS))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def sampled_shapes(sampling, policy, prompts: int):
    """Prompts and their completions, as shapes."""
    some = eqx.filter_eval_shape(eqrl.pad_prompts, [[1] * 5] * prompts, [*range(prompts)], step=1)

    def run(policy, prompts):
        return samplers.Decoder()(policy, prompts, sampling, key=jax.random.key(0))

    return some, eqx.filter_eval_shape(run, policy, some)


def test_an_update_gathers_each_layer_twice_a_micro_batch():
    """Forward and backward, one layer's arrays at a time; and the embedding, but no stack."""
    facts = architecture(num_layers=3, tied=True, qk_norm=False)
    mesh, parts = sharding.make_mesh("fsdp=8"), 2
    algorithm, optimizer = algorithms.dr_grpo(max_tokens=4), optax.sgd(0.1)
    policy = models.abstract(facts)
    state = eqx.filter_eval_shape(lambda p: eqrl.init(p, algorithm, optimizer), policy)
    _, rollout = sampled_shapes(samplers.Sampling(2, 4, (0,)), policy, prompts=8)
    batch, _ = eqx.filter_eval_shape(algorithm.assign, rollout.logprobs, state.algorithm, rollout)

    def update(state, batch):
        return eqrl.update(
            state, batch, algorithm, optimizer,
            micro_batch=16 // parts, buffer=32, implementation=logprobs.over_mesh(mesh),
        )  # fmt: skip

    args = sharding.abstract(state, mesh, facts), over_rows(batch, mesh)
    plan = planned(jax.jit(update, donate_argnums=0), args, mesh)
    gathered = collections.Counter()
    for exchange in plan.collectives:
        if exchange.kind == "all-gather":
            gathered[exchange.bytes] += exchange.count
    expected = collections.Counter()
    for x in jax.tree.leaves(policy.layers):
        if x.ndim == 3:
            expected[4 * x.size // facts.num_layers] += facts.num_layers * parts * 2
    embedding = 4 * policy.embedding.size
    assert gathered.pop(embedding) >= 1
    assert gathered == expected


def test_keys_and_values_are_cut_by_rows_and_heads():
    facts = architecture(num_layers=2, tied=True)
    mesh = sharding.make_mesh("data=4,tensor=2")
    policy = sharding.abstract(models.abstract(facts), mesh, facts)
    decoder, sampling = samplers.Decoder(), samplers.Sampling(2, 32, (0,))
    prompts, _ = sampled_shapes(sampling, policy, prompts=8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    run = jax.jit(lambda policy, prompts, key: decoder(policy, prompts, sampling, key=key))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = str(run.lower(policy, over_rows(prompts, mesh), key).compile().as_text())
    rows, heads = 16 // 4, facts.num_kv_heads // 2
    assert f"f32[{rows},{heads},32,{facts.head_dim}]" in text
    assert f",{facts.num_kv_heads},32,{facts.head_dim}]" not in text
