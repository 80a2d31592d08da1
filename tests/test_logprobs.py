"""What every implementation of the log-probs promises, against the definition in float64."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, sampled_rollout, tiny_model
from members_logprobs import IMPLEMENTATIONS
from oracles_logprobs import ask, check, cotangents, inputs, oracle

import eqrl
from eqrl import logprobs
from eqrl._logprobs.online import Row, outcome
from eqrl.logprobs import chunked, reference, token_logprobs


implementations = pytest.mark.parametrize("member", IMPLEMENTATIONS, ids=repr)
plain = pytest.mark.parametrize("member", [m for m in IMPLEMENTATIONS if not m.compiled], ids=repr)
compiled = pytest.mark.parametrize("member", [m for m in IMPLEMENTATIONS if m.compiled], ids=repr)
stepwise = pytest.mark.parametrize("member", [m for m in IMPLEMENTATIONS if m.kernels], ids=repr)
types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@implementations
@types
@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "temperature", "soft_cap"),
    [
        (33, 40, 32_001, 1.0, None),  # SmolLM-sized, and odd
        (7, 96, 49_152, 0.7, None),
        (6, 16, 151_936, 1.3, None),  # Qwen's
        (131, 100, 1_000, 0.8, 5.0),
        (5, 6, 10, 1.0, None),  # smaller than any tile
        (150, 576, 300, 1.0, 30.0),
    ],
)
def test_both_outputs_and_both_gradients(
    member, tokens, width, vocab, temperature, soft_cap, dtype
):
    arguments = *inputs(tokens, width, vocab, dtype), cotangents(tokens)
    got = ask(member.function, *arguments, temperature=temperature, soft_cap=soft_cap)
    check(got, oracle(*arguments, temperature, soft_cap), dtype)


@plain
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_gradients_in_float64(member, soft_cap, x64):
    arguments = *inputs(9, 6, 1_037, "float64"), cotangents(9)
    got = ask(member.function, *arguments, temperature=0.8, soft_cap=soft_cap)
    check(got, oracle(*arguments, 0.8, soft_cap), "float64")


@implementations
@types
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_ten_thousand(member, temperature, dtype):
    hidden, head, targets = inputs(18, 64, 513, dtype, scale=3e3)
    assert np.abs(np.asarray(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T)).max() > 1e4
    arguments = hidden, head, targets, cotangents(18)
    check(
        ask(member.function, *arguments, temperature=temperature),
        oracle(*arguments, temperature),
        dtype,
    )


@implementations
def test_equal_logits_of_ten_thousand_keep_their_entropy(member):
    hidden = jnp.full((16, 32), 1e4 / 32, jnp.float32)
    arguments = hidden, jnp.ones((700, 32)), jnp.arange(16, dtype=jnp.int32), cotangents(16)
    got = ask(member.function, *arguments)
    np.testing.assert_allclose(np.asarray(got[0]), -np.log(700), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(got[1]), np.log(700), rtol=1e-6)


@implementations
@types
@pytest.mark.parametrize("buffer", [None, 71, 90])
def test_masked_tokens_are_worth_nothing(member, dtype, buffer):
    """No value, no gradient, and not even NaN in their hidden states goes anywhere."""
    hidden, head, targets = inputs(300, 32, 600, dtype)
    mask = np.zeros(300, bool)  # tiles without any token to train, a full one, and single ones
    mask[130:200] = mask[299] = True
    weights = cotangents(300)
    dirty = jnp.where(mask[:, None], hidden, jnp.nan)

    def function(*arguments):
        return token_logprobs(
            *arguments, mask=jnp.asarray(mask), buffer=buffer, implementation=member.function
        )

    got = ask(function, dirty, head, targets, weights)
    want = oracle(hidden, head, targets, weights * mask)
    check(got, [want[0] * mask, want[1] * mask, *want[2:]], dtype)
    np.testing.assert_array_equal(np.asarray(got[2].astype(jnp.float32))[~mask], 0)


@implementations
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_or_one(member, tokens):
    arguments = *inputs(tokens, 6, 37), cotangents(tokens)
    got = ask(functools.partial(token_logprobs, implementation=member.function), *arguments)
    want = oracle(*arguments)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        close(a, b)


@implementations
def test_no_log_prob_of_a_token_that_does_not_exist(member):
    hidden, head, _ = inputs(4, 6, 37)
    targets = jnp.array([-100, 36, 37, -1])
    got = token_logprobs(hidden, head, targets, implementation=member.function)[0]
    np.testing.assert_array_equal(np.isnan(np.asarray(got)), [True, False, True, True])
    masked = token_logprobs(
        hidden, head, targets, mask=targets == 36, implementation=member.function
    )
    assert np.isfinite(np.asarray(masked)).all()


@pytest.mark.parametrize("size", [8, 100])
def test_small_weights_survive_float16(size):
    """A token of thousands has a derivative below float16's smallest number."""
    hidden, head, targets = inputs(9, 16, 64, "float16")
    weights = cotangents(9) * 1e-6
    function = functools.partial(chunked, size=size) if size == 8 else chunked
    got = ask(function, hidden, head, targets, weights)[3]
    want = oracle(hidden, head, targets, weights)[3]
    large = np.abs(want) > 1e-6
    np.testing.assert_allclose(np.asarray(got, np.float64)[large], want[large], rtol=0.05)


@plain
def test_nothing_is_learned_about_the_temperature(member):
    def loss(temperature):
        return jnp.sum(member.function(*inputs(5, 6, 37), temperature=temperature)[0])

    assert jax.grad(loss)(0.7) == 0


@pytest.mark.parametrize("size", [16, None])
def test_second_derivatives_are_finite(size):
    hidden, head, targets = inputs(7, 6, 50, scale=3.0)

    def loss(hidden):
        logprobs, entropy = chunked(hidden, head, targets, size=size)
        return jnp.sum(logprobs**2) + jnp.sum(entropy)

    def norm(hidden):
        return jnp.sum(jax.grad(loss)(hidden) ** 2)

    assert np.isfinite(np.asarray(jax.grad(norm)(hidden))).all()


def test_outside_jit_only_tokens_that_are_not_masked_go_through_the_head():
    hidden, head, targets = inputs(3_000, 8, 20)
    mask = jnp.arange(3_000) % 5 == 0
    rows = []

    def counted(hidden, *rest, **options):
        rows.append(hidden.shape[0])
        return reference(hidden, *rest, **options)

    got = token_logprobs(hidden, head, targets, mask=mask, implementation=counted)
    assert 600 <= rows[0] <= 768
    want = reference(hidden, head, targets)
    for a, b in zip(got, want, strict=True):
        close(a, np.where(mask, b, 0))


def test_shapes_follow_targets_and_a_function_is_used_as_given():
    hidden, head, targets = inputs(12, 6, 37)
    calls = []

    def own(hidden, head, targets, **options):
        calls.append((hidden.shape, options))
        return reference(hidden, head, targets, **options)

    shaped = hidden.reshape(3, 4, 6), head, targets.reshape(3, 4)
    got = token_logprobs(*shaped, temperature=0.5, implementation=own)
    assert calls == [((12, 6), {"temperature": 0.5, "soft_cap": None, "mask": None})]
    assert got[0].shape == (3, 4)
    close(got[0], token_logprobs(*shaped, temperature=0.5, implementation="reference")[0])


@stepwise
def test_only_rows_that_count_and_targets_that_are_here(member):
    hidden, rows, _ = inputs(20, 32, 700)
    first, last = 37, 555
    targets = np.arange(20) * 50 - 100  # some negative, some beyond
    given = (
        jnp.asarray(targets, jnp.int32)[:, None],
        jnp.array([first, last], jnp.int32),
        jnp.ones((20, 1), bool),
        jnp.float32(0.5),
        None,
    )
    z = np.asarray(hidden, np.float64) @ np.asarray(rows, np.float64).T / 2
    here = (first <= targets) & (targets < last)
    seen = member.kernels.absorb(hidden, rows, *given, 300)
    chosen = np.where(here, z[np.arange(20), np.clip(targets, 0, 699)], 0)
    np.testing.assert_allclose(np.asarray(seen.chosen)[:, 0] / 2, chosen, rtol=1e-5, atol=1e-5)
    mass = np.asarray(seen.mass, np.float64)[:, 0] * np.exp(np.asarray(seen.maximum)[:, 0] / 2)
    np.testing.assert_allclose(mass, np.exp(z[:, first:last]).sum(axis=1), rtol=1e-5)
    _, entropy, log_mass = outcome(seen, jnp.float32(0.5))
    row = Row(seen.maximum, log_mass, entropy, jnp.ones((20, 1)), jnp.zeros((20, 1)))
    of_product = np.asarray(member.kernels.differentiate(hidden, rows, *given, row))
    np.testing.assert_array_equal(of_product[:, :first], 0)
    np.testing.assert_array_equal(of_product[:, last:], 0)
    # One half for the target, if it is here, less one half for all rows together.
    np.testing.assert_allclose(of_product.sum(axis=1), here * 0.5 - 0.5, atol=1e-5)


@implementations
def test_with_64_bit_numbers_switched_on(member, x64):
    hidden, head, targets = inputs(33, 32, 301)
    arguments = hidden, head, targets.astype(jnp.int64), cotangents(33)
    check(ask(member.function, *arguments), oracle(*arguments), "float32")


@compiled
@pytest.mark.parametrize(
    "types", [("float16", "float16"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_kernels_refuse_other_types(member, types, x64):
    hidden, head, targets = inputs(4, 8, 10)
    with pytest.raises(ValueError, match=f"hidden is {types[0]} and unembedding {types[1]}"):
        member.function(hidden.astype(types[0]), head.astype(types[1]), targets)


# --- which one runs -------------------------------------------------------------------------------


def primitives(jaxpr) -> set[str]:
    """The names of all operations of a program, those inside others included."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found |= primitives(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize(
    ("implementation", "has", "lacks"),
    [
        (None, {"scan", "custom_vjp_call"}, {"pallas_call"}),
        ("chunked", {"scan", "custom_vjp_call"}, {"pallas_call"}),
        ("reference", set(), {"scan", "custom_vjp_call", "pallas_call"}),
        (IMPLEMENTATIONS[3].function, {"pallas_call"}, set()),
        (IMPLEMENTATIONS[4].function, {"pallas_call"}, set()),
    ],
    ids=["default", "chunked", "reference", "pallas_tpu", "pallas_triton"],
)
def test_the_path_that_was_named_is_the_one_that_runs(implementation, has, lacks):
    # More logits than one slice holds.
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((9_000, 8), (4_096, 8))]
    targets = jax.ShapeDtypeStruct((9_000,), "int32")
    function = functools.partial(token_logprobs, implementation=implementation)
    found = primitives(jax.make_jaxpr(function)(*shapes, targets).jaxpr)
    assert has <= found and not lacks & found


def test_names_are_chosen_by_platform():
    for platform in ("cpu", "gpu", "tpu"):
        assert logprobs.choose(None, platform) is logprobs.choose("chunked", platform) is chunked
        assert logprobs.choose("reference", platform) is reference
    assert logprobs.choose("pallas", "tpu") is logprobs.pallas_tpu
    assert logprobs.choose("pallas", "gpu") is logprobs.pallas_triton


def test_what_cannot_run_here_is_refused():
    with pytest.raises(ValueError, match="'pallas' runs on TPU and GPU, and this is cpu"):
        token_logprobs(*inputs(3, 4, 5), implementation="pallas")


def test_an_unknown_name_is_refused():
    with pytest.raises((ValueError, TypeError), match="implementation"):
        token_logprobs(*inputs(3, 4, 5), implementation="fused")  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"buffer": 4}, "needs `mask`"),
        ({"buffer": 2, "mask": jnp.ones(3, bool)}, "holds 2 tokens a shard, and 3 are not masked"),
        ({"shards": 2, "mask": jnp.ones(3, bool)}, "shards=2 must divide 3 tokens"),
    ],
)
def test_senseless_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        token_logprobs(*inputs(3, 4, 5), **options)


def test_importing_eqrl_does_not_import_pallas():
    code = "import eqrl, sys; print([m for m in sys.modules if 'jax.experimental.pallas' in m])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert found.stdout.strip() == "[]"


# --- memory ---------------------------------------------------------------------------------------


def temporary_bytes(function, tokens, width, vocab, dtype="float32"):
    """What a gradient program needs beside its arguments and results."""

    def loss(hidden, head):
        logprobs, entropy = function(hidden, head, jnp.zeros(tokens, jnp.int32))
        return jnp.sum(logprobs) + jnp.sum(entropy)

    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((tokens, width), (vocab, width))]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@types
def test_memory_is_a_twentieth_of_the_definitions_and_grows_with_tokens_alone(dtype):
    """The sizes of Qwen2.5-3B; nothing is executed."""
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip(
            "XLA's CPU compiler of jax 0.10 widens all of a bfloat16 array (TPU's does not)"
        )
    width, vocab = 2_048, 151_936
    measure = functools.partial(temporary_bytes, width=width, vocab=vocab, dtype=dtype)
    small, large = measure(chunked, 8_192), measure(chunked, 65_536)
    assert small <= 0.05 * measure(reference, 8_192)
    assert large <= 8 * small, "more than linear in the tokens"


# --- in the score and the update, and on many devices ---------------------------------------------


def logprobs_over(mesh):
    return logprobs.over_mesh(mesh, vocab=None, width=None)


def on_mesh(shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


meshes = pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (1, 2, 4), (8, 1, 1)])


@meshes
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_eight_devices_give_the_same_numbers(shape, soft_cap, x64):
    """Neither 21 tokens nor 131 entries divide among them."""
    arguments = *inputs(21, 8, 131, "float64"), cotangents(21)
    function = logprobs.over_mesh(
        on_mesh(shape), implementation=functools.partial(chunked, size=16)
    )
    got = ask(function, *arguments, temperature=0.7, soft_cap=soft_cap)
    check(got, oracle(*arguments, 0.7, soft_cap), "float64")


def test_kernels_give_the_same_numbers_on_eight_devices():
    arguments = *inputs(37, 32, 301), cotangents(37)
    for member in IMPLEMENTATIONS[3:]:
        function = logprobs.over_mesh(on_mesh((2, 2, 2)), implementation=member.function)
        check(ask(function, *arguments), oracle(*arguments), "float32")


def test_no_device_gathers_the_vocabulary_or_holds_its_logits():
    mesh = on_mesh((1, 4, 2))
    function = logprobs.over_mesh(mesh, implementation=functools.partial(chunked, size=64))
    spread = functools.partial(jax.sharding.NamedSharding, mesh)
    spec = jax.sharding.PartitionSpec
    shapes = (
        jax.ShapeDtypeStruct((64, 16), "float32", sharding=spread(spec(("data", "fsdp")))),
        jax.ShapeDtypeStruct((4_096, 16), "float32", sharding=spread(spec("tensor", "fsdp"))),
    )

    def loss(hidden, head):
        targets = jnp.zeros(64, jnp.int32)
        logprobs, entropy = token_logprobs(hidden, head, targets, implementation=function)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    text = program.as_text()
    assert text is not None
    assert "f32[2048,16]" in text, "the device's own entries in full width"
    for shape in ("[4096,16]", "[16,4096]", "[64,4096]", "[16,2048]"):
        assert f"f32{shape}" not in text, f"{shape} is on a device"


def test_tokens_are_condensed_where_they_are():
    """With one shard a device, no device sees the tokens of another."""
    mesh = on_mesh((2, 4, 1))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    hidden, head, targets = inputs(1_024, 24, 64)
    mask = jnp.arange(1_024) % 3 == 0

    def loss(hidden, mask):
        logprobs, entropy = token_logprobs(
            hidden, head, targets, mask=mask, buffer=512, shards=8,
            implementation=logprobs_over(mesh),
        )  # fmt: skip
        return jnp.sum(logprobs) + jnp.sum(entropy)

    arguments = jax.device_put(hidden, rows), jax.device_put(mask, rows)
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    assert text is not None and "f32[1024,24]" not in text and "f32[1,1024,24]" not in text
    got = jax.jit(jax.grad(loss))(*arguments)
    want = oracle(hidden, head, targets, np.ones((2, 1_024)) * np.asarray(mask))[2]
    close(got, want.astype(np.float32))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rows": ("batch",)}, "'batch' is not one of the mesh's"),
        ({"rows": ("data", "tensor")}, "must be an axis of its own"),
        ({"rows": ("data",)}, "width='fsdp' must be one of rows"),
        ({"implementation": "reference"}, "partitioned by XLA itself"),
    ],
)
def test_impossible_layouts_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        logprobs.over_mesh(on_mesh((2, 2, 2)), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_their_gradients_are_the_same_by_every_implementation(tied):
    model, rollout = tiny_model(tied=tied), sampled_rollout(3)
    buffer = int(rollout.mask.sum())

    def loss(model, implementation):
        scores = eqrl.score(model, rollout, buffer=buffer, implementation=implementation)
        return jnp.sum(scores.logprobs) + 0.3 * jnp.sum(scores.entropy)

    def graded(implementation):
        return jax.jit(jax.value_and_grad(lambda model: loss(model, implementation)))(model)

    want = graded("reference")
    others = [member.function for member in IMPLEMENTATIONS[1:]]
    sharded = logprobs.over_mesh(on_mesh((2, 2, 2)), implementation=chunked)
    for implementation in (*others, sharded):
        jax.tree.map(functools.partial(close, scale=10), graded(implementation), want)
