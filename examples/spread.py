"""Rows over devices and processes, and what all processes have to agree on.

Every process runs the whole loop. What a step computes on is *spread* (each device has its rows)
inside the sampler, the log-probs and the update, and *whole* (each process has every row, with
equal bits) in between, where it is small. Whatever Python decides, it decides from whole arrays or
from what is agreed here, so all processes decide alike. In one process nothing here costs anything.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from config import Config
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqrl import models, rewards, sharding
from eqrl.checkpoint import Resume, resolve_resume


Tree = TypeVar("Tree")


def start(config: Config) -> sharding.Processes:
    """All processes of the run; nothing may touch a device before."""
    given = config.distributed
    try:
        return sharding.start(
            given.coordinator,
            given.num_processes,
            given.process_id,
            start_timeout=2 * given.timeout,
            heartbeat_timeout=given.timeout,
        )
    except ValueError as error:
        raise ValueError(f"--distributed: {error}") from None


def alike(config: Config) -> tuple[Config, Resume | None]:
    """The configuration and what to resume, the same in all processes; or one sentence for all."""
    # The default folder has the time in its name, which may pass a second between processes.
    config = dataclasses.replace(config, run_dir=from_first(lambda: config.run_dir))
    _assert_same(dataclasses.asdict(config), apart=("distributed",))

    def resume():
        found = resolve_resume(config.resume, str(config.run_dir))
        return found and (str(found.folder), found.step)

    found = from_first(resume)
    if config.mesh is None and jax.process_count() > 1:
        config = dataclasses.replace(config, mesh="fsdp=-1")
        print(
            f"--mesh fsdp=-1, as there are {jax.process_count()} processes: rows, parameters and "
            f"optimizer are cut over all {jax.device_count()} devices"
        )
    return config, found and Resume(pathlib.Path(found[0]), found[1])


def shards(mesh: Mesh | None) -> int:
    """How many parts the mesh cuts rows into."""
    return 1 if mesh is None else sharding.row_shards(mesh)


def padded(rows: int, mesh: Mesh | None) -> int:
    """Rows after padding them to the mesh."""
    return -(-rows // shards(mesh)) * shards(mesh)


def spread(tree: Tree, mesh: Mesh | None) -> Tree:
    """Rows over the mesh; their number must divide. Each process gives its own part of them."""
    if mesh is None:
        return tree
    if jax.process_count() == 1:
        return sharding.place_rows(tree, mesh)
    part = sharding.row_part(mesh)
    own = jax.tree.map(lambda x: sharding.own_prompts(np.asarray(x), *part), tree)  # type: ignore
    return sharding.to_global(own, mesh)


def whole(tree: Tree, mesh: Mesh | None) -> Tree:
    """Every row in every process; what `spread` takes apart."""
    if mesh is None or jax.process_count() == 1:
        return tree
    return jax.device_put(tree, _everywhere(mesh))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def own_share(rows: int) -> slice:
    """The rows whose completions this process decodes and rewards."""
    size = -(-rows // jax.process_count())
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def join(scored: rewards.Scored, rows: int) -> rewards.Scored:
    """What all processes scored, each its `own_share(rows)`, in every process."""
    if jax.process_count() == 1:
        return scored
    size = -(-rows // jax.process_count())
    own = scored.failed.shape[0]
    facts = (
        np.pad(scored.components, [(0, size - own), (0, 0)]),
        np.pad(scored.failed, (0, size - own)).astype(np.int32),
        np.array([scored.errors, scored.timeouts], np.int32),
    )
    components, failed, counts = gather(facts)
    return dataclasses.replace(
        scored,
        components=components.reshape(-1, components.shape[-1])[:rows],
        failed=failed.reshape(-1)[:rows].astype(bool),
        errors=int(counts[:, 0].sum()),
        timeouts=int(counts[:, 1].sum()),
    )


def gather(tree: Any) -> Any:
    """NumPy arrays of every process, stacked in front; of equal shapes, and 32 bits at most."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree))


def agreed(requested: str | None) -> str | None:
    """The signal that any process was sent, by name, if one was."""
    if jax.process_count() == 1:
        return requested
    number = 0 if requested is None else int(signal.Signals[requested])
    number = int(gather(np.int32(number)).max())
    return signal.Signals(number).name if number else None


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, where alone it is called, in every process; as JSON.

    Raises:
        ValueError: in every process, if `make` does.
    """
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    if sharding.is_first():
        try:
            answer["value"] = make()
        except ValueError as error:
            answer["error"] = str(error)
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(gather(np.int32(text.size))[0])
    # Of the same size everywhere; only what process 0 says is read.
    answer = json.loads(bytes(gather(np.resize(text, size))[0]))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def _assert_same(config: Mapping[str, Any], *, apart: Collection[str]) -> None:
    """Refuses processes that were started with different arguments; without `apart`.

    Raises:
        ValueError: in every process.
    """
    theirs = from_first(lambda: json.dumps(config, default=str))
    if jax.process_count() == 1:
        return
    first, own = (json.loads(x) for x in (theirs, json.dumps(config, default=str)))
    other = [name for name in own if name not in apart and own[name] != first[name]]
    differs = np.flatnonzero(gather(np.int32(len(other) > 0)))
    if differs.size:
        names = f" ({', '.join(other)})" if other else ""
        raise ValueError(
            f"process {differs[0]} was started with other arguments than process 0{names}; give "
            "all the same, except --distributed.process-id"
        )


def assert_same_data(*data: Any) -> None:
    """Refuses processes that read other data than process 0; anything that JSON can hold.

    Raises:
        ValueError: in every process.
    """
    if jax.process_count() == 1:
        return
    found = gather(np.uint32(zlib.crc32(json.dumps(data).encode())))
    differs = np.flatnonzero(found != found[0])
    if differs.size:
        raise ValueError(
            f"--data.path: process {differs[0]} reads other problems than process 0; give all the "
            "same files"
        )


def to_first(model: models.Transformer, mesh: Mesh | None) -> models.Transformer:
    """The model as NumPy in process 0, for saving; the others keep nothing of it.

    Devices hold one layer of one array at a time.
    """
    if mesh is None or jax.process_count() == 1:
        return model
    copy, layer = (jax.jit(f, out_shardings=_everywhere(mesh)) for f in (_copy, _layer))

    def one(x):
        stacked = x.ndim == 3
        if not sharding.is_first():
            for i in range(x.shape[0] if stacked else 1):
                jax.block_until_ready(layer(x, i) if stacked else copy(x))
            return x
        if not stacked:
            return np.asarray(copy(x))
        host = np.empty(x.shape, x.dtype)
        for i in range(len(host)):
            host[i] = layer(x, i)
        return host

    return jax.tree.map(one, model)


def _copy(x):
    return x


def _layer(x, i):
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Standard output of the other processes goes nowhere; warnings and errors of all are seen."""
    if sharding.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
