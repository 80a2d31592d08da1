"""Processes start together, share the data, compute the same numbers, and end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_processes
from helpers import tiny_model

from eqrl import data, sharding
from eqrl.samplers.decoder import _row_keys
from eqrl.sharding import arrays, processes


HEARTBEAT = two_processes.HEARTBEAT


class _Children:
    """Two processes of four devices each, on this machine."""

    def __init__(self, folder, root, mode: str, ids=(0, 1)):
        flags = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
        path = os.pathsep.join(str(root / name) for name in (".", "tests"))
        environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.mode, self.running = folder, mode, {}
        for index in ids:
            script, file = root / "tests" / "two_processes.py", folder / f"{mode}{index}.npz"
            command = [sys.executable, str(script), mode, address, str(index), str(file)]
            with (folder / f"{mode}{index}.log").open("wb") as log:
                self.running[index] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment
                )

    def wait(self, seconds: float) -> dict[int, int]:
        """The exit status of each, by process id; all are ended after that many seconds."""
        end = time.monotonic() + seconds
        try:
            for child in self.running.values():
                child.wait(max(end - time.monotonic(), 0.1))
        finally:
            self.kill()
        return {index: child.returncode for index, child in self.running.items()}

    def kill(self) -> None:
        for child in self.running.values():
            child.kill()
            child.wait()

    def log(self, index: int) -> str:
        return (self.folder / f"{self.mode}{index}.log").read_text(errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def step(folder, request):
    """The long one, which runs while the other tests wait for theirs."""
    children = _Children(folder, request.config.rootpath, "step")
    yield children
    children.kill()


@pytest.fixture
def launch(folder, root):
    launched = []

    def launch(mode, ids=(0, 1)):
        launched.append(_Children(folder, root, mode, ids))
        return launched[-1]

    yield launch
    for children in launched:
        children.kill()


def test_one_process_needs_nothing(capsys):
    assert processes.start() == processes.start("localhost:1", 1, 0)
    assert str(processes.start()) == "process 0/1"
    assert processes.is_first()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("localhost:1", 0, 0), "num_processes=0 must be at least 1"),
        (("localhost:1", 2, 2), "process_id=2 must be below num_processes=2"),
        (("localhost:1", 2, -1), "process_id=-1 must be at least 0"),
        (("localhost", 2, 1), "coordinator='localhost' must be .* host:port"),
        (("localhost:1", 2, None), "process_id cannot be detected here; give"),
        ((None, 2, None), "coordinator and process_id cannot be detected here; give"),
    ],
)
def test_nonsense_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        processes.start(*arguments)
    with pytest.raises(ValueError, match="heartbeat_timeout=0 must be at least 1 second"):
        processes.start(heartbeat_timeout=0)


def test_slurm_is_detected(monkeypatch):
    facts = {"JOB_ID": 7, "STEP_NODELIST": "node[1-4]", "NTASKS": 4, "PROCID": 3, "LOCALID": 0}
    for name, value in facts.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert processes._detect() == ("slurm", 4)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes.start().count == 1


def test_tpu_pods_are_detected(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "first,second")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    assert processes._detect() == ("gketpu", 2)


def test_one_process_raises_as_always():
    alone = processes.start()
    with pytest.raises(KeyError), processes.together(alone):
        raise KeyError


def test_who_is_missing():
    assert "not all 4 processes have reached this one" in processes._missing("a:1", 4, 0, 9)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "process 0 answers" in processes._missing(address, 4, 2, 9)
    assert "process 0 does not answer" in processes._missing(address, 4, 2, 9)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_no_prompt_or_key_repeats(count):
    """Over two steps of an epoch, and any number of processes: the same prompts, the same keys."""
    streams = [data.PromptStream(40, seed=3) for _ in range(count)]
    alone, seen, keys = data.PromptStream(40, seed=3), [], []
    row_keys = jax.jit(_row_keys, static_argnums=2)
    for step in range(2):
        parts = [
            processes.own_prompts(stream.take(16), part, count)
            for part, stream in enumerate(streams)
        ]
        taken = [prompt for part in parts for prompt in part]
        assert taken == alone.take(16)
        seen += taken
        key = jax.random.fold_in(jax.random.key(1), step)
        keys += [jax.random.key_data(row_keys(key, jnp.asarray(ids), 3)) for ids in parts]
    assert len(set(seen)) == len(seen) == 32
    every = np.concatenate(keys)
    assert len(np.unique(every, axis=0)) == len(every) == 96


def test_uneven_prompts_are_refused():
    with pytest.raises(ValueError, match="10 prompts .* over 4 processes; take 8"):
        processes.own_prompts(range(10), 0, 4)
    with pytest.raises(ValueError, match="part=4 must be from 0 to 3"):
        processes.own_prompts(range(8), 4, 4)


def test_arrays_there_and_back():
    """In one process; `test_same_numbers` goes through the same functions in two."""
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    tree = {"a": np.arange(24.0, dtype=np.float32).reshape(8, 3), "b": None, "c": 5}
    there = arrays.to_global(tree, mesh)
    assert there["a"].sharding.shard_shape((8, 3)) == (2, 3)
    back = arrays.to_host(there)
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert (back["b"], back["c"]) == (None, 5)
    with pytest.raises(ValueError, match="no rows that divide over the 4 row shards"):
        arrays.to_global(np.zeros((6, 2)), mesh)


def test_missing_worker_is_an_error(launch):
    children = launch("alone", ids=[0])
    # Its three seconds, and what the interpreter needs to start on a busy machine.
    assert children.wait(60) == {0: 1}
    assert "error: process 0/2 gave up after 3 s, for not all 2 processes" in children.log(0)


def test_one_that_raises_ends_the_other(launch):
    children = launch("raise")
    status = children.wait(150)
    ended = time.time()
    assert status == {0: -signal.SIGABRT, 1: 1}
    assert "process 1/2 raised, which ends all processes" in children.log(1)
    assert "RuntimeError: the reward server is down" in children.log(1)
    # jax lists the dead by number, a line each.
    assert re.search(r"stopped sending heartbeats\):\n1\n", children.log(0))
    assert ended - _last_seen(children.log(1)) < 2.5 * HEARTBEAT


def test_one_that_is_killed_ends_the_other(launch):
    children = launch("kill")
    status = children.wait(150)
    ended = time.time()
    assert status == {0: -signal.SIGKILL, 1: -signal.SIGABRT}
    assert "leader task was preempted/died" in children.log(1)
    assert ended - _last_seen(children.log(0)) < HEARTBEAT


def _last_seen(log: str) -> float:
    found = re.search(r"([\d.]+) last seen", log)
    assert found, log
    return float(found[1])


def test_same_numbers(step, folder):
    """Two processes of four devices and one device: one step of PPO, rollout to update."""
    alone = two_processes.one_step()
    assert step.wait(200) == {0: 0, 1: 0}, step.log(0) + step.log(1)
    assert "process 0/2" in step.log(0) and "process 1/2" in step.log(1)
    found = [np.load(folder / f"step{index}.npz") for index in (0, 1)]
    assert [bool(file["first"]) for file in found] == [True, False]
    for axes in two_processes.MESHES:
        for name, expected in alone.items():
            ours, theirs = (file[f"{axes} {name}"] for file in found)
            if name in ("greedy", "tokens", "mask"):
                np.testing.assert_array_equal(np.concatenate([ours, theirs]), expected)
            elif expected.ndim and not name.startswith("parameter"):
                tolerance = 1e-6 if "advantages" in name else 1e-5
                both = np.concatenate([ours, theirs])
                np.testing.assert_allclose(both, expected, atol=tolerance, rtol=0)
            else:  # whole in both
                np.testing.assert_array_equal(ours, theirs)
                np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    assert np.std(alone["advantages"]) > 0.1
    moved = np.abs(alone["parameter 0"] - np.asarray(jax.tree.leaves(tiny_model(vocab=40))[0]))
    assert np.max(moved) > 5e-4
