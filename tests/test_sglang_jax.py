"""sglang-jax: the way of weights into it, name by name and shape by shape, and what is refused.

That it samples right is in `test_samplers.py`, which starts it where it is installed.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import tiny_model
from members_samplers import no_sglang_jax

from eqrl._pack import compact
from eqrl._prompts import pad_prompts
from eqrl._score import score
from eqrl.models import Architecture, abstract
from eqrl.models._names import entries
from eqrl.samplers import EngineError, Sampling, SGLangJax
from eqrl.samplers._worker.sglang_jax import as_engine_array, engine_name
from eqrl.samplers.install_sglang_jax import find_python


# What `nnx.to_flat_state` said of the engine's model, for the policies of these `config.json`s.
RECORDED = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "sglang_jax_leaves.json").read_text()
)


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: row["name"])
def test_every_array_has_its_place_in_the_engine(row):
    """All names of the engine, no other, and the engine's shape for each."""
    facts = Architecture.from_config(row["config"])
    given = {}
    for entry, leaf in zip(entries(facts), jax.tree.leaves(abstract(facts)), strict=True):
        shape = leaf.shape[1:] if entry.stacked else leaf.shape
        for name in entry.names:
            given[engine_name(name)] = np.zeros(shape, np.float32)
    leaves = {name: tuple(shape) for name, shape in row["leaves"]}
    assert given.keys() == leaves.keys()
    for name, shape in leaves.items():
        assert as_engine_array(given[name], shape, facts.head_dim, name).shape == shape


def test_heads_repeat_where_devices_are_more():
    """With two key and value heads on six devices, each stands three times in a row."""
    x = np.arange(2 * 2 * 4, dtype=np.float32).reshape(2, 8)
    got = as_engine_array(x, (2, 24), 4, "model.layers.0.self_attn.k_proj.weight")
    want = np.concatenate([x[:, :4]] * 3 + [x[:, 4:]] * 3, axis=1)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r"q_proj.weight is \(2, 8\) in the policy"):
        as_engine_array(x, (2, 24), 4, "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match="the engine wants"):
        as_engine_array(x, (3, 8), 4, "model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_length": 0}, "context_length=0 must be a whole number"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"max_total_tokens": -1}, "max_total_tokens=-1"),
        ({"mem_fraction_static": 1.5}, "between 0 and 1"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"device": "npu"}, "device='npu'"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SGLangJax(**options)


def test_a_missing_environment_is_refused_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.delenv("EQRL_SGLANG_PYTHON", raising=False)
    monkeypatch.setattr("eqrl.samplers.sglang_jax.ENVIRONMENT", tmp_path)
    with pytest.raises(ValueError, match="python -m eqrl.samplers.install_sglang_jax"):
        SGLangJax().python()
    with pytest.raises(ValueError, match="python_path=/nowhere is not there"):
        SGLangJax(python_path="/nowhere").python()
    made = tmp_path / "bin" / "python"
    made.parent.mkdir()
    made.touch()
    assert SGLangJax().python() == str(made)


def test_a_context_that_is_too_short_is_refused_before_anything_starts():
    engine = SGLangJax(context_length=64, python_path="/nowhere")
    prompts = pad_prompts([[1] * 50, [2]], [0, 1], step=4)
    with pytest.raises(EngineError, match="give at least 68"):
        engine.submit(tiny_model(), prompts, Sampling(1, 10, (1,)), key=jax.random.key(0))


def test_models_it_would_run_wrongly_are_refused():
    facts = dataclasses.replace(tiny_model().architecture, family="llama", mlp_bias=True)
    model = dataclasses.replace(tiny_model(), architecture=facts)
    with pytest.raises(ValueError, match="mlp_bias"):
        SGLangJax(device="cpu").options(model)
    with pytest.raises(ValueError, match="tp_size=2 does not divide the vocabulary of 37"):
        SGLangJax(device="cpu", tp_size=2).options(tiny_model())


def test_heads_are_widened_where_its_attention_needs_it():
    model = tiny_model()
    assert SGLangJax(device="cpu").prepared(model).architecture.head_dim == 128
    assert SGLangJax(device="tpu").prepared(model) is model


def test_the_python_that_is_found_is_one_it_runs_on():
    found = find_python()
    assert found is None or pathlib.Path(found).exists()


# --- with the engine ------------------------------------------------------------------------------

needs_engine = pytest.mark.skipif(no_sglang_jax() is not None, reason=str(no_sglang_jax()))


@needs_engine
def test_over_two_devices_with_a_head_on_each():
    """One key and value head for two devices: pushed twice, sampled and scored as one."""
    model = tiny_model(vocab=38, head_dim=64)
    layers, facts = model.layers, model.architecture
    one = lambda x: jax.tree.map(lambda x: x[..., :64], x)  # noqa: E731
    layers = dataclasses.replace(layers, key=one(layers.key), value=one(layers.value))
    model = dataclasses.replace(
        model, layers=layers, architecture=dataclasses.replace(facts, num_kv_heads=1)
    )
    model = jax.tree.map(lambda x: x / 2 if x.ndim == 3 else x, model)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with SGLangJax(128, 8, tp_size=2, environment=flags) as engine:
        prompts = pad_prompts([[3, 4, 5], [6]], [4, 9], step=4)
        rollout = engine(model, prompts, Sampling(4, 30, (1,)), key=jax.random.key(0))
    packed = compact(rollout, step=8)
    own, mask = score(model, packed).logprobs, np.asarray(packed.mask)
    np.testing.assert_allclose(packed.logprobs[mask], own[mask], atol=1e-4)


@needs_engine
def test_what_does_not_fit_is_told_with_the_arithmetic_and_leaves_nothing():
    engine = SGLangJax(context_length=2**20, max_running_requests=2**10)
    with pytest.raises(EngineError, match=r"GiB of keys and values .* lower context_length"):
        engine.start(tiny_model())
    assert engine._process is None and engine._folder is None


@needs_engine
def test_weights_in_the_wrong_place_are_noticed_on_the_first_rollout(monkeypatch):
    """As if the layout mapping were wrong: gate and up, of one shape, change places."""
    prepared = SGLangJax.prepared

    def swapped(self, policy):
        policy = prepared(self, policy)
        layers = policy.layers
        layers = dataclasses.replace(layers, gate=layers.up, up=layers.gate)
        return dataclasses.replace(policy, layers=layers)

    monkeypatch.setattr(SGLangJax, "prepared", swapped)
    prompts = pad_prompts([[3, 4, 5]], [4], step=4)
    with SGLangJax(128, 8) as engine, pytest.raises(EngineError, match="other weights"):
        engine.start(tiny_model())  # as the examples do
        engine(tiny_model(), prompts, Sampling(4, 30, (1,)), key=jax.random.key(0))
    assert engine._process is None


@needs_engine
def test_more_devices_than_there_are_is_told_and_not_taken_for_a_lack_of_memory():
    with pytest.raises(EngineError, match=r"tp_size=2, but the engine sees 1 of cpu"):
        SGLangJax(128, 8, tp_size=2, environment={"XLA_FLAGS": ""}).start(tiny_model(vocab=38))
