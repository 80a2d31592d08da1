"""The step on paper: its FLOPs are those of the programs, its meshes those of `mesh_choices`."""

import importlib
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eqrl
from eqrl import models, samplers, sharding
from eqrl.sharding.plan import CHIPS, count_flops


ROOT = pathlib.Path(__file__).resolve().parent.parent
FACTS = models.Architecture("qwen2", 48, 16, 3, 4, 2, 8, 24, attention_bias=True)


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("step_cost")
    sys.modules.pop("step_cost", None)


def of(cost, batch, facts=FACTS):
    one = cost.Cut(1, 1, 1)
    return cost.Model(facts, cost.Slice.of("v6e-1"), batch, one, one)


def test_flops_of_a_forward_pass(cost):
    policy = models.abstract(FACTS, jnp.float32)
    tokens = jax.ShapeDtypeStruct((6, 20), jnp.int32)
    traced = jax.make_jaxpr(lambda policy, x: policy(x, x))(policy, tokens)
    model = of(cost, cost.Batch(3, 2, 12, 8))
    np.testing.assert_allclose(model.forward(model.train, 6, 20).flops, count_flops(traced))


def test_flops_of_the_decoder(cost):
    policy = models.abstract(FACTS, jnp.float32)
    decoder, sampling = samplers.Decoder(), samplers.Sampling(2, 8, stop_ids=(0,))
    prompts = eqrl.pad_prompts([[1] * 12] * 3, [0, 1, 2], step=1)
    traced = jax.make_jaxpr(lambda policy, key: decoder(policy, prompts, sampling, key=key).tokens)(
        policy, jax.random.key(0)
    )
    model = of(cost, cost.Batch(3, 2, 12, 8))
    expected = model.prefill().flops + model.decode().flops
    np.testing.assert_allclose(expected, count_flops(traced, while_trips=8))


@pytest.mark.parametrize("name", ["0.5B", "1.5B", "3B", "7B"])
def test_meshes_are_those_of_auto(cost, name):
    facts, chip = models.known(f"Qwen/Qwen2.5-{name}"), CHIPS["v6e"]
    policy = models.abstract(facts, jnp.bfloat16)
    master = eqx.filter_eval_shape(
        lambda policy: jax.tree.map(lambda x: x.astype(jnp.float32), policy), policy
    )
    state = policy, eqx.filter_eval_shape(optax.adam(1e-3).init, master), master
    choices = sharding.mesh_choices(
        policy,
        state,
        devices=jax.devices()[:8],
        capacity=chip.hbm_bytes,
        row_units=(16,),
        update_tokens=128 * 1536,
        micro_batches=4,
    )
    batch, where = cost.Batch(16, 8, 512, 1024), cost.Slice.of("v6e-8")
    assert tuple(choices[0].mesh.shape.values()) == cost.train_cut(facts, where, batch)


def test_more_chips_or_shorter_completions_never_take_longer(cost):
    steps = {}
    for count, completion in ((8, 1024), (16, 1024), (8, 512)):
        found = cost.best("Qwen/Qwen2.5-3B", f"v6e-{count}", cost.Batch(16, 8, 512, completion))
        steps[count, completion] = found.seconds()
        assert found.memory() <= CHIPS["v6e"].hbm_bytes
    assert steps[16, 1024] < steps[8, 1024] > steps[8, 512]
    assert cost.best("Qwen/Qwen2.5-72B", "v6e-8", cost.Batch(16, 8, 512, 1024)) is None


def test_the_page_has_the_numbers_of_the_script(cost, monkeypatch):
    pytest.importorskip("matplotlib")
    scaling = importlib.import_module("scaling")
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.fill(text) == text, "run python bench/scaling.py"
