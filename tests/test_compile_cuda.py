"""The GPU kernels compiled for real H100 and H200 (Triton to PTX to SASS) on a machine without.

Needs the CUDA plugin of jax, and neither a GPU nor a driver.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from eqrl._logprobs import over_mesh
from eqrl._logprobs.pallas import triton
from eqrl._logprobs.pallas.triton import pallas_triton
from eqrl.sharding.plan import GPU_TARGETS


pytest.importorskip("jax_cuda13_plugin", reason="the CUDA plugin of jax is not installed")

pytestmark = pytest.mark.usefixtures("no_compilation_cache")

VOCAB = 151_936


def _devices(chip, shape):
    """So many of these chips as a mesh of `data`, `fsdp` and `tensor`."""
    topology = topologies.get_topology_desc(
        chip, "cuda", target_config=GPU_TARGETS[chip.lower()], topology=f"1x1x{np.prod(shape)}"
    )
    return Mesh(np.array(topology.devices).reshape(shape), ("data", "fsdp", "tensor"))


def _lowering_for(chip):
    """jax from 0.11 on asks which GPU a Triton kernel is lowered for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice  # pyright: ignore[reportAttributeAccessIssue]

    device = AbstractDevice(device_kind=f"NVIDIA {chip}", num_cores=132, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)  # pyright: ignore[reportCallIssue]
    return jax.sharding.use_abstract_mesh(mesh)


def _compile(
    function,
    mesh,
    tokens,
    width,
    dtype,
    *,
    chip="H200",
    vocab=VOCAB,
    head=(None, None),
    temperature=1.0,
    soft_cap=None,
):
    """Values and gradients by both outputs, compiled for `mesh`: its memory, and its text."""

    def loss(hidden, unembedding, targets, mask):
        logprobs, entropy = function(
            hidden, unembedding, targets, temperature=temperature, soft_cap=soft_cap, mask=mask
        )
        return jnp.sum(logprobs) + 0.3 * jnp.sum(entropy)

    rows = P(("data", "fsdp"))
    arguments = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for shape, kind, spec in [
            ((tokens, width), dtype, rows),
            ((vocab, width), dtype, P(*head)),
            ((tokens,), jnp.int32, rows),
            ((tokens,), jnp.bool_, rows),
        ]
    ]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    with _lowering_for(chip):
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 2
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and "eqrl_absorb" in text and "eqrl_differentiate" in text
    assert memory is not None
    return memory.temp_size_in_bytes, text


@pytest.mark.parametrize(
    ("width", "dtype", "chip"),
    [
        (896, jnp.bfloat16, "H200"),
        (2048, jnp.bfloat16, "H100"),
        (3584, jnp.bfloat16, "H200"),
        (8192, jnp.bfloat16, "H200"),
        (2048, jnp.float32, "H200"),
    ],
)
def test_forward_and_backward(width, dtype, chip):
    mesh = _devices(chip, (1, 1, 1))
    temporary, _ = _compile(pallas_triton, mesh, 8192, width, dtype, chip=chip, temperature=0.7)
    # The gradient of the hidden states is summed up in float32; the rest is slices of the logits.
    assert temporary - 4 * 8192 * width < 0.04 * 4 * 8192 * VOCAB
    assert width > 3584 or temporary < 0.05 * 4 * 8192 * VOCAB


def test_memory_has_no_token_times_vocab_term():
    mesh = _devices("H200", (1, 1, 1))
    temporary, _ = _compile(pallas_triton, mesh, 65_536, 2048, jnp.bfloat16)
    assert temporary < 0.02 * 4 * 65_536 * VOCAB


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ragged_sizes_and_a_soft_cap(dtype):
    mesh = _devices("H200", (1, 1, 1))
    temporary, text = _compile(
        pallas_triton, mesh, 1001, 100, dtype, vocab=32_001, temperature=0.7, soft_cap=30.0
    )
    # Both kernels are in the program, and the logits are not.
    assert text.count("__gpu$xla.gpu.triton") >= 2
    assert temporary < 0.5 * 4 * 1001 * 32_001


def test_over_eight_devices():
    mesh = _devices("H200", (2, 2, 2))
    temporary, text = _compile(
        over_mesh(mesh, implementation=pallas_triton),
        mesh,
        8192,
        2048,
        jnp.bfloat16,
        head=("tensor", "fsdp"),
    )
    # Each device holds half of the head, of its gradient and of a float32 sum, and no logits.
    assert temporary - (2 + 2 + 4) * VOCAB * 2048 // 2 < 0.1 * 4 * 8192 * VOCAB / 8
    assert "all-gather" in text and "all-reduce" in text


def test_shared_memory_is_really_checked(monkeypatch):
    """Else the tests above would prove nothing of it."""
    choose = triton.choose_tiles
    monkeypatch.setattr(triton, "choose_tiles", lambda *args: choose(*args)._replace(stages=6))
    with pytest.raises(Exception, match="(?i)shared memory"):
        _compile(pallas_triton, _devices("H200", (1, 1, 1)), 512, 896, jnp.bfloat16)
