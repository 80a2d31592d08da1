"""Temporary memory of log-probs and entropy with both gradients, by the compilers' own account.

    python bench/logprobs_memory.py

Compiles value and gradients through both outputs for d = 2,048 and V = 151,936, with 8,192 and with
65,536 tokens, for CPU, for TPUs (needs `libtpu`) and for an H100 (needs jax's CUDA plugin), and
executes nothing: no accelerator is needed, and no array of these sizes exists. Prints a Markdown
table and writes it to docs/benchmarks/logprobs_memory.md.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import time


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P  # noqa: E402

from eqrl._logprobs.chunked import chunked  # noqa: E402
from eqrl._logprobs.pallas.mosaic_tpu import pallas_tpu  # noqa: E402
from eqrl._logprobs.reference import reference  # noqa: E402
from eqrl.sharding.plan import GPU_TARGETS  # noqa: E402


WIDTH, VOCAB = 2048, 151_936
TOKENS = 8192, 65_536
ROOT = pathlib.Path(__file__).resolve().parent.parent
TPUS = {"v5e": "v5e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def targets():
    """Name of each target, its first device, and the implementations compiled for it."""
    both = {"reference": reference, "chunked": chunked}
    yield "CPU", jax.devices("cpu")[0], both
    if importlib.util.find_spec("libtpu"):
        for name, topology in TPUS.items():
            device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
            more = both if name == "v5e" else {}
            yield f"TPU {name}", device, {**more, "pallas": pallas_tpu}
    if importlib.util.find_spec("jax_cuda13_plugin"):
        from eqrl._logprobs.pallas.triton import pallas_triton

        device = topologies.get_topology_desc(
            "h100", "cuda", target_config=GPU_TARGETS["h100"], topology="1x1x1"
        ).devices[0]
        yield "H100", device, {**both, "pallas": pallas_triton}


def traced_for(name: str, device):
    """Kernels choose tiles as on this chip; jax from 0.11 on needs it to lower for a GPU at all."""
    from jax.sharding import AbstractDevice, use_abstract_mesh

    if name == "CPU" or name == "H100" and jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    if name == "H100":
        chip = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    else:
        chip = AbstractDevice(
            device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
        )
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=chip))


def temporaries(name, device, function, tokens: int, dtype: str) -> int | None:
    """Bytes beside arguments and results; `None` if the compiler says they exceed the chip."""

    def loss(hidden, unembedding, targets):
        logprobs, entropy = function(
            hidden, unembedding, targets, temperature=1.0, soft_cap=None, mask=None
        )
        return jnp.sum(logprobs) + jnp.sum(entropy)

    place = NamedSharding(Mesh(np.array([device]), ("device",)), P())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    shapes = (
        array((tokens, WIDTH), dtype), array((VOCAB, WIDTH), dtype), array((tokens,), jnp.int32),
    )  # fmt: skip
    with traced_for(name, device):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes)
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            return None
    assert memory is not None
    return memory.temp_size_in_bytes


def rows():
    for name, device, functions in targets():
        for dtype in ("bfloat16", "float32") if len(functions) > 1 else ("bfloat16",):
            base = None
            for label, function in functions.items():
                start = time.perf_counter()
                few, many = (temporaries(name, device, function, n, dtype) for n in TOKENS)
                base = few if label == "reference" else base
                logits = TOKENS[0] * VOCAB * 4
                share = few and few / (base or logits)
                note = "" if base else " of the float32 logits"
                print(
                    f"{name} {dtype} {label}: {time.perf_counter() - start:.0f} s", file=sys.stderr
                )
                yield (
                    name, dtype, label, size(few), size(many),
                    "-" if share is None or label == "reference" else f"{share:.1%}{note}",
                    "-" if few is None or many is None else f"{many / few:.1f}",
                )  # fmt: skip


def size(bytes_: int | None) -> str:
    return "does not fit" if bytes_ is None else f"{bytes_ / 2**20:,.0f}"


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    header = ["target", "inputs", "implementation", *(f"{n:,} tokens, MiB" for n in TOKENS)]
    header += [f"of reference at {TOKENS[0]:,}", f"growth over {TOKENS[1] // TOKENS[0]}x tokens"]
    table = [header, ["---"] * len(header), *rows()]
    versions = [version(x) for x in ("jax", "libtpu", "jax-cuda13-plugin")]
    text = "\n".join(
        [
            "# Temporary memory of the log-probs",
            "",
            f"{time.strftime('%Y-%m-%d')}; {', '.join(versions)}; Python {sys.version.split()[0]}.",
            f"Log-probs and entropy, value and both gradients through both outputs, d = {WIDTH:,},",
            f"V = {VOCAB:,}. `memory_analysis().temp_size_in_bytes` of the program: what it",
            "needs beside its arguments and results. Compiled, not run. A TPU's compiler may keep",
            "what fits in on-chip memory, which this number leaves out. \"does not fit\": the",
            "compiler refuses the program for want of HBM.",
            "",
            *("| " + " | ".join(row) + " |" for row in table),
            "",
            "Made by `python bench/logprobs_memory.py`.",
            "",
        ]
    )  # fmt: skip
    print(text)
    (ROOT / "docs" / "benchmarks" / "logprobs_memory.md").write_text(text)


if __name__ == "__main__":
    main()
