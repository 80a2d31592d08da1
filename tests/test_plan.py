"""Plans say what compilers and closed forms say, for chips that are not here."""

import dataclasses
import functools
import importlib.util
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec as P

from eqrl import models, samplers, sharding
from eqrl._logprobs.chunked import chunked
from eqrl._logprobs.pallas.mosaic_tpu import choose_tiles
from eqrl._prompts import Prompts
from eqrl._score import score
from eqrl._types import Rollout
from eqrl.models import Architecture
from eqrl.sharding import plan
from eqrl.sharding.plan import collectives, hlo, program, trips
from eqrl.sharding.plan.topology import _physical_memory


pytestmark = pytest.mark.usefixtures("no_compilation_cache")

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the CUDA plugin of jax is not installed",
)
TPUS = [pytest.param(name, marks=needs_tpu) for name in ("v4-16", "v5e-8", "v6e-8")]
EVERYWHERE = ["here", *TPUS, pytest.param("h200-8", marks=needs_cuda)]


@functools.cache
def described(name):
    return plan.here() if name == "here" else plan.topology(name)


def mesh_of(name, axes):
    return sharding.make_mesh(axes, described(name).devices)


def array(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def planned(name, function, args, mesh, **options):
    return plan.plan_program(
        "program", function, args, topology=described(name), mesh=mesh, **options
    )


# --- topologies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "hosts", "kind"),
    [
        pytest.param(*case, marks=needs_tpu)
        for case in [
            ("v4-8", 4, 1, "TPU v4"),
            ("v4-16", 8, 2, "TPU v4"),
            ("v5p-8", 4, 1, "TPU v5"),
            ("v5e-8", 8, 1, "TPU v5 lite"),
            ("v5litepod-8", 8, 1, "TPU v5 lite"),
            ("v6e-1", 1, 1, "TPU v6 lite"),
            ("v6e-4", 4, 1, "TPU v6 lite"),
            ("v6e-8", 8, 1, "TPU v6 lite"),
            ("V6E-16", 16, 4, "TPU v6 lite"),
            ("v6e-64", 64, 16, "TPU v6 lite"),
            ("v6e-256", 256, 64, "TPU v6 lite"),
        ]
    ]
    + [
        pytest.param(*case, marks=needs_cuda)
        for case in [
            ("h100-1", 1, 1, "NVIDIA H100"),
            ("h100-8", 8, 1, "NVIDIA H100"),
            ("h200-1", 1, 1, "NVIDIA H200"),
            ("h200-16", 16, 2, "NVIDIA H200"),
            ("h200-64", 64, 8, "NVIDIA H200"),
        ]
    ],
)
def test_names_of_the_cloud(name, devices, hosts, kind):
    found = plan.topology(name)
    assert len(found.devices) == devices and found.hosts == hosts
    assert len({device.process_index for device in found.devices}) == hosts
    assert {device.device_kind for device in found.devices} == {kind} == {found.chip.device_kind}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v6e-12", "'v6e-12' does not exist; the nearest is v6e-8"),
        ("v4-10", "the nearest is v4-8"),
        ("h200-24", "the nearest is h200-16"),
        ("b200-8", "the nearest is h200-8, and chips are v4, v5e, v5p, v6e, h100, h200"),
    ],
)
def test_other_names_are_refused_with_the_nearest(name, match):
    with pytest.raises(ValueError, match=match):
        plan.topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v6e-8", "tpu"), ("h200-8", "cuda")])
def test_a_missing_compiler_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'pip install "eqrl\[{extra}\]"'):
        plan.topology(name)


@needs_tpu
@pytest.mark.parametrize(
    ("name", "share"),
    # Links of a chip in the corner: 2x2x1 of 6, 2x4 of 4, all of them around a torus.
    [("v4-8", 2 / 6), ("v4-16", 3 / 6), ("v6e-1", 0), ("v6e-8", 2 / 4), ("v6e-256", 1)],
)
def test_small_slices_leave_links_unconnected(name, share):
    found = described(name)
    assert found.link_bytes_per_s is not None and found.chip.link_bytes_per_s is not None
    np.testing.assert_allclose(found.link_bytes_per_s, share * found.chip.link_bytes_per_s)


def test_capacity_is_what_a_compiler_accepts():
    gib = {name: chip.hbm_bytes / 2**30 for name, chip in plan.CHIPS.items()}
    assert gib["v4"] <= 30.75 and gib["v5e"] <= 15.75 and gib["v5p"] <= 95 and gib["v6e"] <= 31.25
    assert all(chip.source.startswith("https://") for chip in plan.CHIPS.values())


def test_this_machine_has_its_memory_and_no_peaks():
    found = plan.here()
    assert found.devices == tuple(jax.devices()) and found.hosts == 1
    total = _physical_memory()
    assert found.chip.hbm_bytes == total // len(jax.devices())
    assert 2**28 < total < 2**46 and found.chip.bf16_flops is None


@pytest.mark.parametrize("name", EVERYWHERE)
def test_programs_are_traced_for_the_chip_and_for_the_mesh(name):
    mesh = mesh_of(name, "data=2,fsdp=2,tensor=-1")
    seen = []

    def step(x, _):
        seen.append(jax.sharding.get_abstract_mesh())
        return models.by_rows(jnp.sin(x)), None

    def function(x):
        return lax.scan(step, x, None, length=3)[0]

    with described(name).tracing(mesh):
        lowered = jax.jit(function).lower(array(mesh, (8, 16), None, "tensor"))
    assert dict(seen[-1].shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert seen[-1].abstract_device.device_kind == described(name).chip.device_kind
    text = lowered.as_text()
    assert '[{"data", "fsdp"}, {}]' in text, text
    assert lowered.compile().output_shardings.spec[0] == ("data", "fsdp")


@needs_tpu
def test_kernels_choose_their_tiles_for_the_chip():
    mesh = mesh_of("v6e-8", "fsdp=-1")
    few = choose_tiles(8192, 151_936, 2048, 2).tokens
    with described("v6e-8").tracing(mesh):
        assert choose_tiles(8192, 151_936, 2048, 2).tokens == 1024 > few


# --- FLOPs ----------------------------------------------------------------------------------------

FACTS = Architecture(
    family="qwen2",
    vocab_size=320,
    width=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ff_width=40,
    attention_bias=True,
)
ATTENTION = FACTS.num_heads * FACTS.head_dim
LAYER = FACTS.width * (2 * ATTENTION + 2 * FACTS.num_kv_heads * FACTS.head_dim + 3 * FACTS.ff_width)


def model_shapes():
    return models.abstract(FACTS)


def tokens_shape(rows, time):
    return jax.ShapeDtypeStruct((rows, time), jnp.int32)


def flops_of(function, *args, trips=1):
    return plan.count_flops(eqx.filter_make_jaxpr(function)(*args)[0], trips)


def forward_flops(rows, time):
    products = 2 * rows * time * LAYER * FACTS.num_layers
    return products + 4 * rows * time**2 * ATTENTION * FACTS.num_layers


@pytest.mark.parametrize("remat", [False, True])
def test_flops_of_a_forward_pass(remat):
    args = model_shapes(), tokens_shape(4, 16), tokens_shape(4, 16)
    count = flops_of(lambda model, *xs: model(*xs, remat=remat), *args)
    assert count == forward_flops(4, 16)


def rollout_shapes(rows, time):
    def make():
        array = functools.partial(jnp.zeros, (rows, time))
        row = functools.partial(jnp.zeros, (rows,))
        return Rollout(
            array(jnp.int32), array(bool), array(jnp.int32), array(), row(jnp.int32), row(bool)
        )

    return jax.eval_shape(make)


@pytest.mark.parametrize(("remat", "parts"), [(False, 1), (True, 1), (True, 3)])
def test_flops_of_an_update(remat, parts):
    """Forward, twice that backward, what is computed again, and the head's four products."""
    rows, time, buffer = 6, 16, 24
    head = functools.partial(chunked, size=64)

    def loss(model, rollout):
        scores = score(model, rollout, implementation=head, buffer=buffer, remat=remat)
        return jnp.sum(scores.logprobs)

    def update(model, rollout):
        def step(total, part):
            return jax.tree.map(jnp.add, total, eqx.filter_grad(loss)(model, part)), None

        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rollout)
        zeros = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
        return lax.scan(step, zeros, split)[0]

    count = flops_of(update, model_shapes(), rollout_shapes(rows, time))
    layers = 3 * forward_flops(rows, time)
    if remat:
        # The last product of a layer is in no derivative, so it is not done again.
        last = 2 * rows * time * FACTS.width * FACTS.ff_width * FACTS.num_layers
        layers += forward_flops(rows, time) - last
    assert count == layers + parts * 8 * buffer * FACTS.width * FACTS.vocab_size


def test_flops_of_a_rollout():
    count, width, samples, slots = 2, 16, 4, 32
    shape = (count, width)
    prompts = jax.eval_shape(
        lambda: Prompts(*(jnp.zeros(s, jnp.int32) for s in (shape, shape, (count,))))
    )
    decoder, sampling = samplers.Decoder(), samplers.Sampling(samples, slots, (0,))
    total = flops_of(
        lambda model, prompts, key: decoder(model, prompts, sampling, key=key),
        model_shapes(), prompts, jax.random.key(0), trips=slots,
    )  # fmt: skip
    rows = count * samples * slots
    steps = 2 * rows * (LAYER * FACTS.num_layers + FACTS.width * FACTS.vocab_size)
    steps += 4 * rows * (width + slots) * ATTENTION * FACTS.num_layers
    # How a decoder attends is its own affair.
    np.testing.assert_allclose(total, forward_flops(count, width) + steps, rtol=0.03)
    # Only the loop depends on the trips.
    np.testing.assert_allclose(
        total - flops_of(
            lambda model, prompts, key: decoder(model, prompts, sampling, key=key),
            model_shapes(), prompts, jax.random.key(0), trips=slots // 2,
        ), steps / 2, rtol=0.03,
    )  # fmt: skip


def test_flops_of_every_way_to_call():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = 2 * 8**3
    mesh = sharding.make_mesh("data=2,fsdp=4")
    half = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )

    def kernel(x, out):
        out[...] = jnp.dot(x[...], x[...])

    block = pl.BlockSpec((8, 8), lambda i: (0, 0))
    call = pl.pallas_call(kernel, out_shape=x, grid=(5,), in_specs=[block], out_specs=block)
    choice = lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    loop = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)  # noqa: E731
    nested = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, loop, x)  # noqa: E731
    batched = lambda x: jnp.einsum("bij,bjk->bik", jnp.stack([x] * 3), jnp.stack([x] * 3))  # noqa: E731
    assert flops_of(choice, x) == 2 * one
    assert flops_of(loop, x, trips=7) == flops_of(nested, x, trips=7) == 7 * one
    assert flops_of(batched, x) == 3 * one
    assert flops_of(half, x) == 2 * (2 * 4 * 8 * 4) * 4
    assert flops_of(call, x) == 5 * one
    assert flops_of(jax.checkpoint(jax.jit(lambda x: x @ x)), x) == one
    image = jax.ShapeDtypeStruct((2, 3, 10, 10), jnp.float32)
    weights = jax.ShapeDtypeStruct((5, 3, 3, 3), jnp.float32)
    convolution = lambda x, w: lax.conv(x, w, (1, 1), "VALID")  # noqa: E731
    assert flops_of(convolution, image, weights) == 2 * (2 * 5 * 8 * 8) * 3 * 3 * 3


# --- what moves -----------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 5, 512, 512


def layers(weights, x, wrap=lambda step: step):
    """A scan over layers whose weights are cut by rows: they are gathered, one layer at a time."""

    def step(x, weight):
        weight = lax.with_sharding_constraint(weight, P())
        return models.by_rows(jnp.tanh(x @ weight)), None

    return lax.scan(wrap(step), x, weights)[0]


def layer_shapes(mesh, count=LAYERS, dtype=jnp.bfloat16):
    weights = array(mesh, (count, WIDTH, WIDTH), None, "fsdp", dtype=dtype)
    return weights, array(mesh, (ROWS, WIDTH), ("data", "fsdp"), dtype=dtype)


def of_kind(result, kind):
    return [c for c in result.collectives if c.kind == kind]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_gather_in_a_scan_counts_for_every_layer(name):
    mesh = mesh_of(name, "data=2,fsdp=4")
    # CPUs have no bfloat16 products, and gather what they have widened.
    dtype = jnp.float32 if name == "here" else jnp.bfloat16
    result = planned(name, jax.jit(layers), layer_shapes(mesh, dtype=dtype), mesh)
    whole = WIDTH * WIDTH * jnp.dtype(dtype).itemsize
    assert [(c.kind, c.bytes, c.group_size, c.count) for c in result.collectives] == [
        ("all-gather", whole, 4, LAYERS)
    ]
    np.testing.assert_allclose(result.collectives[0].sent, LAYERS * whole * 3 / 4)
    assert set(result.collectives[0].groups) == {(0, 1, 2, 3), (4, 5, 6, 7)}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_gradients_are_summed_once_a_layer(name):
    mesh = mesh_of(name, "fsdp=8")
    dtype = jnp.float32 if name == "here" else jnp.bfloat16

    def gradient(weights, x):
        loss = lambda w: jnp.sum(layers(w, x, jax.checkpoint).astype(jnp.float32))  # noqa: E731
        found = jax.grad(loss)(weights)
        return lax.with_sharding_constraint(found, P(None, "fsdp"))

    result = planned(name, jax.jit(gradient), layer_shapes(mesh, dtype=dtype), mesh)
    whole = WIDTH * WIDTH * jnp.dtype(dtype).itemsize
    gathers = of_kind(result, "all-gather")
    sums = of_kind(result, "reduce-scatter") + of_kind(result, "all-reduce")
    assert sum(c.bytes * c.count for c in gathers) == 2 * LAYERS * whole
    big = [c for c in sums if c.bytes >= whole]
    assert sum(c.count for c in big) in (LAYERS, 1)  # or all of them after the loop
    assert sum(c.bytes * c.count for c in big) == LAYERS * whole
    if name in ("v5e-8", "v6e-8", "h200-8"):
        assert {c.kind for c in big} == {"reduce-scatter"}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_loop_without_a_known_end_runs_as_often_as_one_says(name):
    mesh = mesh_of(name, "fsdp=8")

    def decode(weights, x):
        more = lambda c: (c[0] < 1000) & (jnp.sum(c[1]) < 1e9)  # noqa: E731
        return lax.while_loop(more, lambda c: (c[0] + 1, layers(weights, c[1])), (0, x))[1]

    results = [
        planned(name, jax.jit(decode), layer_shapes(mesh, dtype=jnp.float32), mesh, while_trips=n)
        for n in (None, 100, 200)
    ]
    counts = [sum(c.count for c in of_kind(r, "all-gather")) for r in results]
    assert counts == [LAYERS, 100 * LAYERS, 200 * LAYERS]
    assert results[2].flops == 2 * results[1].flops == 200 * LAYERS * 2 * ROWS * WIDTH**2
    once, more, most = (r.bytes or 0 for r in results)
    assert once > 0
    np.testing.assert_allclose((most - more) / 100, (more - once) / 99)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_bytes_of_a_chain_of_products(name):
    """Weights once each, activations in and out: too large for the memory on any of the chips.

    All are returned, for a TPU's compiler makes one of several products.
    """
    mesh = mesh_of(name, "data=8")
    rows, width, count = 8 * 65_536, 768, 3

    def chain(weights, x):
        found = [x]
        for weight in weights:
            found.append(models.by_rows(found[-1] @ weight))
        return found[1:]

    weights = (array(mesh, (width, width), dtype=jnp.float32),) * count
    args = weights, array(mesh, (rows, width), "data", dtype=jnp.float32)
    result = planned(name, jax.jit(chain), args, mesh)
    assert result.flops == 2 * count * rows * width**2 and result.bytes is not None
    between, once = rows // 8 * width * 4, count * width * width * 4
    if name == "here" or name.startswith("h"):
        np.testing.assert_allclose(result.bytes, once + 2 * count * between, rtol=0.1)
    else:  # a product may be read as bfloat16, which is written besides, or not be read at all
        assert once + (count + 1) * between <= result.bytes
        assert result.bytes <= 1.1 * (once + 2 * count * between)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_bytes_of_one_product(name):
    mesh = mesh_of(name, "data=8")
    rows, into, out = 8 * 65_536, 1024, 512
    args = array(mesh, (rows, into), "data"), array(mesh, (into, out))
    dtype = jnp.float32 if name == "here" else jnp.bfloat16
    args = jax.tree.map(lambda x: x.update(dtype=dtype), args)
    result = planned(name, jax.jit(lambda x, w: x @ w), args, mesh)
    expected = jnp.dtype(dtype).itemsize * (rows // 8 * (into + out) + into * out)
    np.testing.assert_allclose(result.bytes or 0, expected, rtol=0.05)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_cache_costs_the_column_that_is_written(name):
    mesh = mesh_of(name, "data=8")
    shape, steps = (8 * 16, 8, 4096, 128), 50

    def fill(cache, new):
        def step(i, cache):
            column = new * i.astype(jnp.float32)
            return lax.dynamic_update_slice_in_dim(cache, column, i, axis=2)

        return lax.fori_loop(0, steps, step, cache)

    args = (
        array(mesh, shape, "data", dtype=jnp.float32),
        array(mesh, (shape[0], shape[1], 1, shape[3]), "data", dtype=jnp.float32),
    )
    result = planned(name, jax.jit(fill, donate_argnums=0), args, mesh)
    cache = 4 * math.prod(shape) // 8
    assert result.bytes is not None and result.bytes < 0.3 * cache
    assert result.alias_bytes >= cache


@pytest.mark.parametrize("name", [*TPUS, pytest.param("h200-8", marks=needs_cuda)])
def test_a_run_time_is_bounded_by_what_it_does_most(name):
    mesh = mesh_of(name, "fsdp=8")
    result = planned(name, jax.jit(layers), layer_shapes(mesh), mesh)
    chip, seconds, rate = described(name).chip, result.seconds, described(name).link_bytes_per_s
    assert seconds and chip.bf16_flops and chip.hbm_bytes_per_s and result.bytes and rate
    assert result.flops == 2 * LAYERS * ROWS * WIDTH**2
    np.testing.assert_allclose(seconds.compute, result.flops / 8 / chip.bf16_flops)
    np.testing.assert_allclose(seconds.memory, result.bytes / chip.hbm_bytes_per_s)
    sent = LAYERS * WIDTH**2 * 2 * 7 / 8
    np.testing.assert_allclose(seconds.links, sent / rate)
    assert seconds.total == max(seconds[:3])


@needs_cuda
def test_hosts_are_joined_by_slower_links():
    mesh = sharding.make_mesh("data=2,fsdp=8", plan.topology("h200-16").devices)
    traffic = lambda *groups: plan.Traffic(  # noqa: E731
        0, (plan.Collective("all-reduce", 10**9, groups, len(groups[0])),)
    )
    topology = plan.topology("h200-16")
    within = plan.roofline(0, traffic(tuple(range(8))), topology, mesh)
    across = plan.roofline(0, traffic((0, 8)), topology, mesh)
    everywhere = plan.roofline(0, traffic(tuple(range(16))), topology, mesh)
    assert within and across and everywhere
    np.testing.assert_allclose(within.links, 2 * 7 / 8 * 1e9 / 450e9)
    np.testing.assert_allclose(across.links, 1e9 / 50e9)
    # All eight adapters of a host work, so NVLink is the slower part.
    np.testing.assert_allclose(everywhere.links, 2 * 15 / 16 * 1e9 / 450e9)


# --- whole programs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["here", pytest.param("v6e-8", marks=needs_tpu)])
def test_memory_is_that_of_the_compiler(name):
    mesh = mesh_of(name, "fsdp=8")
    weights = array(mesh, (1024, 1024), "fsdp", dtype=jnp.float32)

    @eqx.filter_jit(donate="all-except-first")
    def update(fixed, state, power):
        gradient, rate = fixed
        return eqx.tree_at(lambda s: s["w"], state, state["w"] - rate * gradient**power)

    state = {"w": weights, "name": "static"}
    result = planned(name, update, ((weights, 0.5), state, 2), mesh, resident_bytes=1000, calls=3)
    part = 1024 * 1024 * 4 // 8
    assert result.argument_bytes == 2 * part and result.output_bytes >= part
    assert result.alias_bytes == part
    parts = result.argument_bytes + result.output_bytes - result.alias_bytes
    parts += result.temporary_bytes + result.code_bytes
    assert result.hbm_bytes == parts + 1000
    assert result.fits and result.over_bytes == 0 and result.calls == 3
    full = dataclasses.replace(result, resident_bytes=result.capacity + 2**30 - parts)
    assert not full.fits and full.over_bytes == 2**30
    assert "HBM" in str(result) and "fits" in str(result) and "x 3" in str(result)
    assert "does not fit by 1.00 GiB" in str(full)
    assert (result.seconds is None) == (name == "here")


@pytest.mark.parametrize("name", [*TPUS, pytest.param("h200-8", marks=needs_cuda)])
def test_what_is_too_large_is_said_to_be(name):
    mesh = mesh_of(name, "data=8")
    rows, vocab = 8 * 2**20, 152_064
    args = array(mesh, (rows, 128), "data"), array(mesh, (128, vocab))
    result = planned(name, jax.jit(lambda hidden, head: hidden @ head), args, mesh)
    logits = 2 * rows // 8 * vocab
    assert not result.fits and result.hbm_bytes > logits
    assert result.argument_bytes >= (rows // 8 + vocab) * 128 * 2
    assert result.over_bytes == result.hbm_bytes - result.capacity > 0
    assert "does not fit by" in str(result)


def test_other_failures_of_a_compiler_are_raised():
    assert program.needed_bytes("INTERNAL: Mosaic failed to compile TPU kernel") is None
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 19.4M of 16.0M vmem."
    assert program.needed_bytes(vmem) is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (160.00G) exceeds available HBM (30.75G).",
            160,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (1.50T) exceeds available HBM (31.24G).",
            1536,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. "
            "Exceeded hbm capacity by 2.75G.",
            18.5,
        ),
    ],
)
def test_messages_of_compilers(message, gib):
    assert program.needed_bytes(message) == gib * 2**30


def test_arrays_need_a_sharding():
    mesh = mesh_of("here", "fsdp=8")
    bare = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(ValueError, match=r"args\[1\]\['x'\] has no sharding"):
        planned("here", jax.jit(lambda a, b: b["x"]), (0, {"x": bare}), mesh)


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", [1, 2, 3, 17, 64, 999, 1000])
@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_search_finds_the_largest_that_fits(border, bend):
    tried = []

    def spare(n):
        tried.append(n)
        # Nearly a line, and steeper further out.
        return int(1e9 * ((border + 0.5) * (1 + bend * border / 1000) - n * (1 + bend * n / 1000)))

    assert plan.search(spare, 1, 1000) == border
    assert len(tried) == len(set(tried)) <= 8
    assert border in tried and (border == 1000 or border + 1 in tried)


def test_search_where_nothing_or_everything_fits():
    assert plan.search(lambda n: -1, 4, 100) is None
    assert plan.search(lambda n: 10**9, 4, 100) == 100
    assert plan.search(lambda n: 5, 3, 3) == 3
    steps = lambda n: 10 if n < 37 else -10  # noqa: E731
    assert plan.search(steps, 1, 100, tries=20) == 36
    with pytest.raises(ValueError, match="low=5 must not be above high=4"):
        plan.search(steps, 5, 4)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=[4,2]<=[8], x", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups={}, x", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_of_devices(attributes, groups):
    assert collectives._groups(attributes, 8) == groups


@pytest.mark.parametrize(
    ("shape", "size", "stored"),
    [
        ("f32[]", 4, 4),
        ("pred[3,5]{1,0}", 15, 15),
        ("bf16[16,100]{1,0:T(8,128)(2,1)}", 3200, 16 * 128 * 2),
        ("f32[100,16]{0,1:T(8,128)}", 6400, 16 * 128 * 4),
        ("bf16[16,100]{1,0:T(8,128)(2,1)S(1)}", 3200, 0),
        ("(f32[8]{0}, /*index=1*/s32[2]{0:S(4)}, u32[])", 44, 36),
        ("f8e4m3fn[10]", 10, 10),
        ("s4[10]", 5, 5),
    ],
)
def test_bytes_of_a_shape(shape, size, stored):
    assert hlo.size(shape) == size and hlo.stored(shape) == stored


LOOP = """
%add (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%a, %two)
}

%body (state: (s32[], s32[])) -> (s32[], s32[]) {
  %state = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%add
  ROOT %out = (s32[], s32[]) tuple(%next, %n)
}

%condition (state.1: (s32[], s32[])) -> pred[] {
  %state.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=1
  ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (limit: s32[]) -> (s32[], s32[]) {
  %limit = s32[] parameter(0)
  %start = s32[]{:T(128)} constant(3)
  %end = s32[]{:T(128)} constant(10)
  %copy = s32[] copy(%start)
  %first = (s32[], s32[]) tuple(%copy, %end)
  ROOT %loop = (s32[], s32[]) while(%first), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("", "", 4),  # 3, 5, 7, 9
        ("direction=LT", "direction=LE", 4),
        ("constant(10)", "constant(9)", 3),
        ("direction=LT", "direction=GT", None),
        ("tuple(%copy, %end)", "tuple(%copy, %limit)", None),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"17"}}', 17),
    ],
)
def test_loops_that_end_at_a_constant(old, new, count):
    read = hlo.parse(LOOP.replace(old, new) if old else LOOP)
    main = read.computations[read.entry]
    assert trips.known_trips(main["loop"], main, read) == count


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="as_text"):
        plan.read_traffic("nothing", 1)
