"""Weights go straight from the file into their shards, and nothing is read or held twice."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import eqrl
from eqrl import algorithms, models, sharding
from eqrl.models import _names, _read
from eqrl.models._safetensors import SafetensorsSource


GOLDEN = Path(__file__).parent / "golden" / "models"
MESHES = ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")
# 87 million parameters: 174 MB in the file, 348 MB in float32.
BIG = models.Architecture("qwen2", 16384, 1024, 8, 16, 4, 64, 2048, attention_bias=True)
MB = 10**6


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _write_random(folder: Path, facts: models.Architecture) -> None:
    """A checkpoint in four bfloat16 files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(facts.to_config()))
    rng = np.random.default_rng(0)
    files: list[dict[str, np.ndarray]] = [{} for _ in range(4)]
    for entry in _names.entries(facts):
        for i, name in enumerate(entry.names):
            values = rng.standard_normal(entry.shape, np.float32)
            files[i % 4][name] = values.astype(ml_dtypes.bfloat16)
    where = {}
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"{number}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"{number}.safetensors")
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big") / "model"
    _write_random(folder, BIG)
    return folder


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read from now on."""
    sizes: list[int] = []
    read = SafetensorsSource.read

    def counting(self, name, index):
        array = read(self, name, index)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(SafetensorsSource, "read", counting)
    return sizes


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", ["qwen2_yarn", "qwen3_bias"])
def test_values_and_shards(name, axes):
    mesh = sharding.make_mesh(axes)
    plain = models.load(GOLDEN / name).model
    placed = models.load(GOLDEN / name, place=sharding.placement(mesh)).model
    assert eqx.tree_equal(jax.device_get(placed), jax.device_get(plain))
    wanted = sharding.shardings(plain, mesh, plain.architecture)
    assert jax.tree.map(lambda x: x.sharding, placed) == wanted


def test_layers_may_be_cut_too():
    mesh = sharding.make_mesh("data=2,fsdp=4")
    spec = lambda x: ("data", "fsdp") if len(x.shape) == 3 else ()  # noqa: E731
    where = lambda x: NamedSharding(mesh, PartitionSpec(*spec(x)))  # noqa: E731
    placed = models.load(GOLDEN / "qwen2_yarn", place=lambda m: jax.tree.map(where, m)).model
    assert placed.layers.gate.weight.addressable_shards[0].data.shape[0] == 1
    plain = models.load(GOLDEN / "qwen2_yarn").model
    assert eqx.tree_equal(jax.device_get(placed), jax.device_get(plain))


def test_gguf_and_types(tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_weights import _write_gguf

    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    for case in ("llama_linear", "qwen2_tied"):
        _write_gguf(gguf, case, tmp_path / f"{case}.gguf")
        how = {"dtype": jnp.bfloat16, "place": sharding.placement(mesh)}
        placed = models.load(tmp_path / f"{case}.gguf", **how).model
        plain = models.load(GOLDEN / case, dtype=jnp.bfloat16).model
        assert placed.embedding.dtype == jnp.bfloat16
        cut = placed.layers.gate.weight.addressable_shards[0].data.shape
        assert cut == (2, plain.architecture.width // 4, plain.architecture.ff_width // 2)
        assert eqx.tree_equal(jax.device_get(placed), jax.device_get(plain))


def test_quantized_rows(tmp_path):
    """Of tensors in blocks of 32, only those that hold the asked rows and columns are read."""
    gguf = pytest.importorskip("gguf")
    from eqrl.models._gguf import GGUFSource

    source = GGUFSource.__new__(GGUFSource)
    source.architecture = models.Architecture("llama", 19, 64, 1, 4, 2, 8, 24)
    array = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = array.reshape(4, 2, 4, 64).swapaxes(1, 2).reshape(32, 64)  # as llama.cpp has q and k
    names = {"a.q_proj.weight": stored, "a.up_proj.weight": array}

    class Tensor:
        tensor_type, shape = kind, (64, 32)

        def __init__(self, data):
            self.data = gguf.quantize(data, kind)

    source._tensors = {name: Tensor(data) for name, data in names.items()}
    whole = gguf.dequantize(gguf.quantize(array, kind), kind)
    for name in names:
        for columns in (slice(7, 50), slice(32, 64), slice(33, 40), slice(0, 64)):
            got = source.read(name, (slice(5, 23), columns))
            np.testing.assert_array_equal(got, whole[5:23, columns])


def test_what_all_devices_hold_is_read_once(monkeypatch):
    sizes = _count_reads(monkeypatch)
    model = models.load(GOLDEN / "qwen2_tied").model
    once = sum(sizes)
    assert once == _bytes(models.abstract(model.architecture, jnp.bfloat16))  # as in the file
    for axes in ("data=8", "data=2,fsdp=4"):
        sizes.clear()
        mesh = sharding.make_mesh(axes)
        models.load(GOLDEN / "qwen2_tied", place=sharding.placement(mesh))
        assert sum(sizes) == once, axes


def test_large_tensors_are_read_in_blocks_of_rows(monkeypatch):
    plain = models.load(GOLDEN / "llama_scaled").model
    monkeypatch.setattr(_read, "_BLOCK_BYTES", 300)
    sizes = _count_reads(monkeypatch)
    assert eqx.tree_equal(models.load(GOLDEN / "llama_scaled").model, plain)
    assert max(sizes) <= 300 and len(sizes) > 100


def test_a_tied_copy_is_compared_in_blocks(tmp_path, monkeypatch):
    from test_weights import _copy, _edit

    folder = _copy("llama_linear", tmp_path)
    _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    monkeypatch.setattr(_read, "_BLOCK_BYTES", 300)
    assert models.load(folder).model.head is None
    changed = lambda x: np.concatenate([x[:-1], x[-1:] + 1])  # noqa: E731
    _edit(folder, lambda t: t.update({"lm_head.weight": changed(t["lm_head.weight"])}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        models.load(folder)


def test_a_wrong_place_is_refused():
    with pytest.raises(ValueError, match="place must return a tree like the model"):
        models.load(GOLDEN / "qwen3", place=lambda model: model.layers)


# --- memory, in processes of their own ------------------------------------------------------------


class _Child:
    """This file as a program, with some fake devices."""

    def __init__(self, devices: int, *arguments):
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
        root = Path(__file__).parents[1]
        path = os.pathsep.join(map(str, (root, root / "tests")))
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path},
        )

    def anonymous(self) -> int:
        """Bytes of memory that belong to no file; mapped checkpoints do not count."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        return int(found[1]) * 1024 if found else 0

    def finish(self) -> dict:
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err[-3000:]
        return json.loads(out.splitlines()[-1])


def _peak_of_loading(folder, axes: str, how: str) -> tuple[int, dict]:
    """Peak of anonymous memory above what the process had before, looked at every millisecond."""
    import select

    child = _Child(8, "memory", folder, axes, how)
    try:
        assert child.process.stdout and child.process.stdin
        line = child.process.stdout.readline()
        assert line == "ready\n", child.process.communicate()[1][-3000:]
        baseline = child.anonymous()
        child.process.stdin.write("\n")
        child.process.stdin.flush()
        peak = baseline
        while not select.select([child.process.stdout], [], [], 0.001)[0]:
            peak = max(peak, child.anonymous())
        return peak - baseline, child.finish()
    finally:
        child.process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("axes", MESHES[:2])
def test_no_host_holds_a_second_copy_and_no_device_more_than_its_share(big, axes):
    peak, report = _peak_of_loading(big, axes, "placed")
    total = _bytes(models.abstract(BIG))
    assert report["equal"]
    print(f"{axes}: peak {peak / MB:.0f} MB for a model of {total / MB:.0f} MB")
    part = total / 8  # more than the largest part of a stacked array
    assert 0.9 * total < peak <= 1.15 * total + part
    assert max(report["held"]) <= total / 8 * 1.01
    assert sum(report["held"]) <= total * 1.01


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_a_second_copy(big):
    peak, _ = _peak_of_loading(big, "fsdp=8", "moved")
    total = _bytes(models.abstract(BIG))
    print(f"loaded and then placed: peak {peak / MB:.0f} MB for a model of {total / MB:.0f} MB")
    assert peak > 1.6 * total


def _memory(folder: str, axes: str, how: str) -> None:
    """A child: loads, says so, and then compares."""
    mesh = sharding.make_mesh(axes)
    models.load(GOLDEN / "qwen3", place=sharding.placement(mesh))  # imports, buffers of the runtime
    print("ready", flush=True)
    sys.stdin.readline()
    if how == "placed":
        model = models.load(folder, place=sharding.placement(mesh)).model
    else:
        model = sharding.place(models.load(folder).model, mesh, BIG)
    jax.block_until_ready(model)
    print("loaded", flush=True)
    held = [0] * 8
    for leaf in jax.tree.leaves(model):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    plain = models.load(folder).model
    equal = eqx.tree_equal(jax.device_get(model), jax.device_get(plain))
    print(json.dumps({"held": held, "equal": bool(equal)}), flush=True)


def test_each_of_two_processes_reads_its_half(big):
    """And makes its half of the training state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [_Child(4, "half", big, address, index) for index in range(2)]
    try:
        reports = [child.finish() for child in children]
    finally:
        for child in children:
            child.process.kill()
    total = _bytes(models.abstract(BIG, jnp.bfloat16))
    for report in reports:
        print(f"read {report['read'] / MB:.0f} MB of {total / MB:.0f} MB")
        assert 0.5 * total <= report["read"] <= 0.51 * total
        assert report["equal"] and report["same_state"] and report["usable"]


def _state(policy):
    critic = models.ValueModel.init(policy)
    return eqrl.init(policy, algorithms.ppo(), optax.adam(1e-3), critic=critic)


def _half(folder: str, address: str, index: str) -> None:
    """A child: one of two processes."""
    from helpers import tiny_model

    with sharding.together(
        sharding.start(address, 2, int(index), start_timeout=60, heartbeat_timeout=20)
    ):
        mesh = sharding.make_mesh("fsdp=8")
        sizes = _count_reads(pytest.MonkeyPatch())
        model = models.load(folder, dtype=jnp.bfloat16, place=sharding.placement(mesh)).model
        read = sum(sizes)
        equal = _equal_shards(model, models.load(folder, dtype=jnp.bfloat16).model)
        policy, facts = tiny_model(vocab=40), tiny_model(vocab=40).architecture
        whole = _state(policy)
        policy = sharding.place(policy, mesh, facts)
        state = sharding.create(lambda: _state(policy), mesh, facts)
        same = _equal_shards(state, whole)
        usable = bool(np.isfinite(np.asarray(state.policy.norm)).all())
        report = {"read": read, "equal": equal, "same_state": same, "usable": usable}
        print(json.dumps(report), flush=True)


def _equal_shards(tree, whole) -> bool:
    pairs = zip(*(jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (tree, whole)), strict=True)
    return all(
        np.array_equal(np.asarray(shard.data), np.asarray(other)[shard.index])
        for x, other in pairs
        for shard in x.addressable_shards
    )


if __name__ == "__main__":
    {"memory": _memory, "half": _half}[sys.argv[1]](*sys.argv[2:])
