"""The decoder against transformers' own numbers, and what must hold for any decoder.

The golden checkpoints and arrays come from `golden/make_models.py`; torch is not needed here.
"""

import dataclasses
import json
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqrl.models import (
    Architecture,
    RopeScaling,
    Transformer,
    ValueModel,
    _known,
    abstract,
    attention,
    causal,
    known,
    load,
    previous,
)
from eqrl.models._norm import rms_norm


GOLDEN = Path(__file__).parent / "golden" / "models"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
TINY = Architecture("llama", 19, 16, 2, 4, 2, 4, 24)
RICH = dataclasses.replace(
    TINY,
    family="qwen3",
    head_dim=6,
    tied=False,
    qk_norm=True,
    attention_bias=True,
    output_bias=True,
)


@jax.jit
def _run(model, tokens, positions):
    return model(tokens, positions)


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """`(model, arrays)`; the arrays of a case, with the rows' real tokens in `real`."""
    folder = GOLDEN / request.param
    arrays = dict(np.load(folder / "arrays.npz"))
    arrays["real"] = arrays["positions"] >= 0
    return load(folder).model, arrays


def _close(got, arrays, name):
    real = arrays["real"]
    np.testing.assert_allclose(
        np.asarray(got)[real], arrays[name][real], rtol=1e-5, atol=2e-5, err_msg=name
    )


def _ids(arrays):
    return jnp.asarray(arrays["tokens"], jnp.int32), jnp.asarray(arrays["positions"], jnp.int32)


def test_golden_embedding(golden):
    model, arrays = golden
    _close(model.embed(_ids(arrays)[0]), arrays, "embedding")


@pytest.mark.parametrize("i", [0, 1])
def test_golden_attention(golden, i):
    model, arrays = golden
    positions = _ids(arrays)[1]
    layer, x = model.unstacked()[i], _stream(arrays, i)
    q, k, v = layer.qkv(x, model.rotary(positions))
    attended = attention(q, k, v, causal(positions, positions))
    _close(layer.output(attended.reshape(*x.shape[:2], -1)), arrays, f"attention_{i}")


@pytest.mark.parametrize("i", [0, 1])
def test_golden_feed_forward(golden, i):
    model, arrays = golden
    layer, x = model.unstacked()[i], _stream(arrays, i) + arrays[f"attention_{i}"]
    normed = rms_norm(x, layer.post_norm, layer.norm_eps)
    _close(layer.feed_forward(normed), arrays, f"feed_forward_{i}")


def test_golden_final_norm(golden):
    model, arrays = golden
    _close(model.final(_stream(arrays, 2)), arrays, "final")


def test_golden_logits(golden):
    model, arrays = golden
    hidden = _run(model, *_ids(arrays))
    _close(hidden @ model.unembedding.T, arrays, "logits")


def _stream(arrays, layers):
    """transformers' residual stream after so many layers."""
    x = arrays["embedding"]
    for i in range(layers):
        x = x + arrays[f"attention_{i}"] + arrays[f"feed_forward_{i}"]
    return jnp.asarray(x)


# A row of seven tokens and two ways to lay it out; garbage stands on padding.
POSITIONS = jnp.array([[0, 1, 2, 3, 4, 5, 6, -1, -1, -1], [-1, 0, 1, 2, -1, 3, 4, 5, -1, 6]])


def _layouts(key):
    tokens = jax.random.randint(key, (2, 10), 0, 19)
    row = tokens[0, :7]
    return tokens.at[1, jnp.array([1, 2, 3, 5, 6, 7, 9])].set(row)


@pytest.mark.parametrize("facts", [TINY, RICH])
def test_padding_changes_nothing(facts):
    model = Transformer.init(facts, key=jax.random.key(0))
    model = jax.tree.map(lambda x: 4 * x, model)
    tokens = _layouts(jax.random.key(1))
    hidden = _run(model, tokens, POSITIONS)
    real = POSITIONS >= 0
    np.testing.assert_allclose(hidden[0][real[0]], hidden[1][real[1]], rtol=1e-5, atol=1e-5)
    garbage = jnp.where(real, tokens, (tokens + 7) % 19)
    again = _run(model, garbage, POSITIONS)
    np.testing.assert_array_equal(hidden[real], again[real])
    assert np.all(np.isfinite(again))


def test_future_is_not_seen():
    model = Transformer.init(TINY, key=jax.random.key(0))
    tokens = _layouts(jax.random.key(1))
    changed = jnp.where(POSITIONS == 4, (tokens + 1) % 19, tokens)
    before, after = (_run(model, x, POSITIONS) for x in (tokens, changed))
    past = (POSITIONS >= 0) & (POSITIONS < 4)
    np.testing.assert_array_equal(before[past], after[past])
    assert not np.allclose(before[POSITIONS == 5], after[POSITIONS == 5])


def test_attention_of_blind_queries_is_zero_with_zero_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 3, 4, 2))
    k, v = (jax.random.normal(key, (1, 5, 2, 2)) for key in keys[1:])
    visible = jnp.zeros((1, 3, 5), bool).at[0, 1, :2].set(True)
    out = attention(q, k, v, visible)
    np.testing.assert_array_equal(out[0, 0], jnp.zeros((4, 2)))
    assert np.any(out[0, 1] != 0)
    gradient = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, visible) ** 2), (0, 1, 2))
    grads = gradient(q, k, v)
    np.testing.assert_array_equal(grads[0][0, 0], jnp.zeros((4, 2)))
    for grad in grads[1:]:
        assert np.all(np.isfinite(grad))
        np.testing.assert_array_equal(grad[0, 2:], jnp.zeros((3, 2, 2)))


def test_attention_groups_queries_as_repeated_keys_would():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 3, 6, 4))
    k, v = (jax.random.normal(key, (2, 5, 2, 4)) for key in keys[1:])
    wide_k, wide_v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, wide_k) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, wide_v)
    got = attention(q, k, v, jnp.ones((2, 3, 5), bool))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_gradients_against_finite_differences(x64):
    model = Transformer.init(RICH, key=jax.random.key(0), dtype=jnp.float64)
    model = jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, model)
    tokens = _layouts(jax.random.key(1))
    probe = jax.random.normal(jax.random.key(2), (2, 10, 16), jnp.float64)
    probe = jnp.where((POSITIONS >= 0)[..., None], probe, 0.0)
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(3)
    direction = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves])

    @jax.jit
    def losses_and_slopes(model):
        def loss(step, remat):
            moved = jax.tree.map(lambda x, d: x + step * d, model, direction)
            return jnp.sum(moved(tokens, POSITIONS, remat=remat) * probe)

        slopes = [jax.grad(loss)(0.0, remat) for remat in (False, True)]
        return jax.lax.map(lambda step: loss(step, False), jnp.array([1e-6, -1e-6])), slopes

    losses, slopes = losses_and_slopes(model)
    expected = (losses[0] - losses[1]) / 2e-6
    np.testing.assert_allclose(slopes, [expected, expected], rtol=1e-6)


def test_tied_is_one_array_and_learns_from_both_uses():
    model = Transformer.init(TINY, key=jax.random.key(0))
    assert model.head is None and model.unembedding is model.embedding
    untied = Transformer.init(dataclasses.replace(TINY, tied=False), key=jax.random.key(0))
    assert len(jax.tree.leaves(untied)) == len(jax.tree.leaves(model)) + 1
    untied = eqx.tree_at(lambda m: m.head, untied, untied.embedding)
    tokens = _layouts(jax.random.key(1))

    @jax.jit
    @jax.grad
    def gradient(model):
        return jnp.sum((model(tokens, POSITIONS) @ model.unembedding.T) ** 2)

    both = gradient(untied).embedding + gradient(untied).head
    np.testing.assert_allclose(gradient(model).embedding, both, rtol=1e-4, atol=1e-5)


def _half_and_full():
    model = Transformer.init(RICH, key=jax.random.key(0))
    half = jax.tree.map(lambda x: (4 * x if x.ndim > 2 else x).astype(jnp.bfloat16), model)
    return half, jax.tree.map(lambda x: x.astype(jnp.float32), half)


def _loss(model, tokens):
    hidden = model(tokens, POSITIONS).astype(jnp.float32)
    probe = jnp.sin(jnp.arange(hidden.size, dtype=jnp.float32)).reshape(hidden.shape)
    return jnp.sum(jnp.where((POSITIONS >= 0)[..., None], hidden * probe, 0.0))


def test_half_width_weights_give_nearly_the_full_results():
    half, full = _half_and_full()
    tokens = _layouts(jax.random.key(1))
    hidden, wide = (_run(model, tokens, POSITIONS) for model in (half, full))
    assert hidden.dtype == jnp.bfloat16
    _near(hidden, wide, 0.03)
    gradient = jax.jit(jax.grad(_loss))
    got, expected = gradient(half, tokens), gradient(full, tokens)
    for grad, wide_grad in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert grad.dtype == jnp.bfloat16
        _near(grad, wide_grad, 0.06)


def _near(got, expected, share):
    """The error's norm is at most this share of the expected norm."""
    expected = np.asarray(expected)
    error = np.asarray(got, np.float32) - expected
    np.testing.assert_array_less(np.linalg.norm(error), share * np.linalg.norm(expected) + 1e-3)


def test_no_product_sees_widened_operands():
    """Forward and backward: that is what `contract` is for."""
    half, _ = _half_and_full()
    jaxpr = jax.make_jaxpr(jax.grad(_loss))(half, _layouts(jax.random.key(1)))
    operands = [str(dtype) for dtype in _product_operands(jaxpr.jaxpr)]
    assert len(operands) > 40
    assert set(operands) == {"bfloat16"}


def _product_operands(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (var.aval.dtype for var in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _product_operands(inner)


def test_previous():
    expected = [[0, 0, 1, 2, 3, 4, 5, 0, 0, 0], [0, 0, 1, 2, 0, 3, 5, 6, 0, 7]]
    np.testing.assert_array_equal(previous(POSITIONS), expected)
    # Columns in any order, and sequences that do not begin at 0.
    np.testing.assert_array_equal(previous(jnp.array([[7, 9, 8, -1, 20]])), [[0, 2, 0, 0, 0]])


def test_value_is_the_prediction_before_the_token():
    backbone = Transformer.init(TINY, key=jax.random.key(0))
    critic = ValueModel.init(backbone)
    tokens = _layouts(jax.random.key(1))
    np.testing.assert_array_equal(_run(critic, tokens, POSITIONS), jnp.zeros((2, 10)))
    weight = jax.random.normal(jax.random.key(2), (16,))
    critic = eqx.tree_at(lambda c: (c.weight, c.bias), critic, (weight, jnp.array(0.5)))
    values = _run(critic, tokens, POSITIONS)
    at = _run(backbone, tokens, POSITIONS) @ weight + 0.5
    np.testing.assert_allclose(values[0, 1:7], at[0, :6], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values[1, 9], at[1, 7], rtol=1e-5, atol=1e-6)
    assert critic.backbone.embedding is not backbone.embedding


def test_value_head_learns_although_it_starts_at_zero():
    critic = ValueModel.init(Transformer.init(TINY, key=jax.random.key(0)))
    tokens = _layouts(jax.random.key(1))
    gradient = jax.jit(jax.grad(lambda c: jnp.sum((c(tokens, POSITIONS) - 1.0) ** 2)))
    assert np.any(gradient(critic).weight != 0)


def test_config_round_trip():
    for name in CASES:
        config = json.loads((GOLDEN / name / "config.json").read_text())
        facts = Architecture.from_config(config)
        assert Architecture.from_config(json.loads(json.dumps(facts.to_config()))) == facts


def test_config_of_transformers_4_and_5_mean_the_same():
    config = json.loads((GOLDEN / "llama_scaled" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    old = config | {"rope_theta": theta, "rope_scaling": rope}
    new = config | {"rope_parameters": rope | {"rope_theta": theta}}
    facts = Architecture.from_config(old)
    assert facts == Architecture.from_config(new)
    assert facts.rope_theta == 5e3
    assert facts.rope_scaling == RopeScaling("llama3", 8.0, 32, 1.0, 4.0)


UNSUPPORTED = {
    "mistral": {"model_type": "mistral"},
    "Qwen2ForSequenceClassification": {"architectures": ["Qwen2ForSequenceClassification"]},
    "gelu": {"hidden_act": "gelu"},
    "num_experts": {"num_experts": 8},
    "gptq": {"quantization_config": {"quant_method": "gptq"}},
    "sliding-window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "sliding_window to false": {"layer_types": ["full_attention", "sliding_attention"]},
    "longrope": {"rope_scaling": {"rope_type": "longrope"}},
    "'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "mscale": {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "'hidden_size'": {"hidden_size": None},
    "num_kv_heads": {"num_key_value_heads": 3},
}
PLAIN = {
    "model_type": "qwen2",
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_unsupported_is_refused_by_name(named):
    Architecture.from_config(PLAIN)
    with pytest.raises(ValueError, match=named):
        Architecture.from_config(PLAIN | UNSUPPORTED[named])


def test_a_window_that_no_layer_uses_is_no_obstacle():
    unused = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    assert Architecture.from_config(PLAIN | unused) == Architecture.from_config(PLAIN)


def test_what_no_config_can_say_is_refused():
    facts = Architecture.from_config(PLAIN)
    with pytest.raises(ValueError, match="mlp_bias"):
        dataclasses.replace(facts, mlp_bias=True).to_config()


# --- published architectures ----------------------------------------------------------------------

# Billions of parameters, with and without those of embedding and head, from the model cards.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": (0.49, 0.36),
    "Qwen/Qwen2.5-1.5B": (1.54, 1.31),
    "Qwen/Qwen2.5-3B": (3.09, 2.77),
    "Qwen/Qwen2.5-7B": (7.61, 6.53),
    "Qwen/Qwen2.5-14B": (14.7, 13.1),
    "Qwen/Qwen2.5-32B": (32.5, 31.0),
    "Qwen/Qwen2.5-72B": (72.7, 70.0),
    "Qwen/Qwen3-0.6B": (0.6, 0.44),
    "Qwen/Qwen3-1.7B": (1.7, 1.4),
    "Qwen/Qwen3-4B": (4.0, 3.6),
    "Qwen/Qwen3-8B": (8.2, 6.95),
    "Qwen/Qwen3-14B": (14.8, 13.2),
    "Qwen/Qwen3-32B": (32.8, 31.2),
    "HuggingFaceTB/SmolLM2-135M": (0.1345, None),
    "HuggingFaceTB/SmolLM2-360M": (0.3618, None),
    "HuggingFaceTB/SmolLM2-1.7B": (1.71, None),
    "meta-llama/Llama-3.3-70B-Instruct": (70.6, None),
}


def _counts(facts):
    model = abstract(facts)
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    return total, total - model.embedding.size - (0 if model.head is None else model.head.size)


@pytest.mark.parametrize("repo", PUBLISHED)
def test_known_architectures_have_the_published_numbers_of_parameters(repo):
    for count, billions in zip(_counts(known(repo)), PUBLISHED[repo], strict=True):
        if billions is not None:
            digits = len(str(billions).partition(".")[2])
            # Cards cut or round, and that of the 14B says 13.1 for 13.21.
            slack = max(10**-digits, 0.01 * billions)
            assert abs(count / 1e9 - billions) < slack, (count, billions)


@pytest.mark.parametrize("repo", _known._KNOWN)
def test_known_variants_have_the_shapes_of_their_base(repo):
    facts = known(repo)
    base = re.sub(r"-(Instruct|Base|Math)\b", "", repo)
    if base in _known._KNOWN:
        assert _counts(facts) == _counts(known(base))
    assert facts.tied == (_counts(facts)[0] < 5e9)
    assert Architecture.from_config(facts.to_config()) == facts


def test_names_that_are_not_known_get_the_nearest():
    with pytest.raises(ValueError, match="nearest names are Qwen/Qwen2.5-7B-Instruct, "):
        known("Qwen/Qwen25-7B-Instruct")
    with pytest.raises(ValueError, match="not in eqrl's table of architectures; they are like"):
        known("xyz")


def test_abstract_models_have_shapes_and_types_and_no_arrays():
    model = abstract(RICH, jnp.bfloat16)
    real = Transformer.init(RICH, key=jax.random.key(0), dtype=jnp.bfloat16)
    assert jax.tree.structure(model) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(real), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
