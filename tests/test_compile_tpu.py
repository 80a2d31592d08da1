"""The TPU kernels compiled for real chips (Mosaic, through libtpu) on a machine without one."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
    use_abstract_mesh,
)

from eqrl._logprobs import over_mesh
from eqrl._logprobs.pallas.mosaic_tpu import choose_tiles, pallas_tpu


pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")

VOCAB = 151_936
KERNELS = 2


@pytest.fixture(scope="module", autouse=True)
def _quiet(no_compilation_cache):
    """Keeps libtpu from asking a cloud where it is, and lets several processes load it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v4-8",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


def _devices(chips, shape):
    """Some of these chips as a mesh of `data`, `fsdp` and `tensor`."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chips)
    devices = np.array(topology.devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"))


def _traced_for(mesh):
    """Kernels choose their tiles as on such a chip; without, they take those that fit any."""
    device = mesh.devices.flat[0]
    abstract = AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract))


def _compile(function, mesh, tokens, width, dtype, rows=None, head=None, **options):
    """Values and both gradients through both outputs."""

    def loss(hidden, unembedding, targets, mask, temperature):
        logprobs, entropy = function(
            hidden, unembedding, targets, mask=mask, temperature=temperature,
            **{"soft_cap": None, **options},
        )  # fmt: skip
        return jnp.sum(logprobs) + jnp.sum(entropy * entropy)

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    return (
        jax.jit(jax.value_and_grad(loss, (0, 1)))
        .lower(
            array((tokens, width), dtype, rows),
            array((VOCAB, width), dtype, *(head or ())),
            array((tokens,), jnp.int32, rows),
            array((tokens,), jnp.bool_, rows),
            array((), jnp.float32),
        )
        .compile()
    )


def _temporaries(compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _kernels(compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


# Every chip, every width, both types, tiles of a known and of an unknown chip: not their product,
# for each takes the compiler some seconds.
@pytest.mark.parametrize(
    ("chips", "width", "dtype", "soft_cap", "is_known"),
    [
        ("v4:2x2x1", 3584, "bfloat16", None, True),
        ("v5e:2x2", 2048, "bfloat16", 30.0, True),
        ("v5p:2x2x1", 8192, "bfloat16", None, True),
        ("v6e:2x2", 3584, "bfloat16", None, True),
        ("v5e:2x2", 896, "float32", None, False),
    ],
)
def test_forward_and_backward_compile(chips, width, dtype, soft_cap, is_known):
    tokens = 2000
    mesh = _devices(chips, (1, 1, 1))
    compile_ = functools.partial(
        _compile, pallas_tpu, mesh, tokens, width, dtype, soft_cap=soft_cap
    )
    if is_known:
        with _traced_for(mesh):
            expected = 512 if chips.startswith("v4") else 1024
            assert choose_tiles(8192, VOCAB, width, 2).tokens == expected
            compiled = compile_()
    else:
        assert not pltpu.is_tpu_device()
        compiled = compile_()
    assert _kernels(compiled) == KERNELS
    # A slice of 4,096 columns, the hidden states' gradient in float32, and copies of slices.
    itemsize = jnp.dtype(dtype).itemsize
    room = tokens * (4096 + 2 * width) * 4 + 4 * 4096 * width * itemsize
    assert _temporaries(compiled) < room


def test_on_a_mesh_with_vocabulary_and_width_spread():
    mesh = _devices("v5e:2x4", (2, 2, 2))
    compiled = _compile(
        over_mesh(mesh, implementation=pallas_tpu), mesh, 4096, 896, "bfloat16",
        rows=("data", "fsdp"), head=("tensor", "fsdp"),
    )  # fmt: skip
    text = str(compiled.as_text())
    assert _kernels(compiled) == KERNELS
    gathered = re.findall(r"= \(?(?:bf16|f32)\[([\d,]+)\][^=]*all-gather", text)
    assert gathered, "the unembedding's width was to be gathered"
    for shape in gathered:
        assert max(map(int, shape.split(","))) <= VOCAB // 2
    # A device's half of the unembedding in its whole width; its gradient, and the float32 sum.
    assert _temporaries(compiled) < 6 * VOCAB // 2 * 896 * 2


def test_temporaries_do_not_grow_with_tokens_times_vocabulary():
    mesh = _devices("v5e:2x2", (1, 1, 1))
    width, few, many = 128, 8192, 32_768
    temp = {
        tokens: _temporaries(_compile(pallas_tpu, mesh, tokens, width, "bfloat16"))
        for tokens in (few, many)
    }
    assert temp[many] < 0.05 * many * VOCAB * 4
    assert temp[many] - temp[few] < (many - few) * (4096 * 2 + 8 * width + 512)
