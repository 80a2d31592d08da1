"""The scripts' loop in two processes of four devices: the numbers, files and ends of one process.

As a program, `python test_training_processes.py STOP WORD...`, this file is one of the processes;
with STOP = 1 it is sent SIGTERM while it rewards the first completion of training.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from config import parse
from task import Task
from training import train
from word_problems import problems

from eqrl import rewards, tracking
from eqrl.models import load


pytest.importorskip("orbax.checkpoint")

WORDS = [
    *("--algo.name", "dapo", "--steps", "3", "--algo.minibatches", "2", "--rollout.passes", "2"),
    *("--rollout.prompts", "4", "--rollout.samples", "4", "--rollout.max-tokens", "8"),
    # Hot enough that the completions of a prompt differ, and two problems an evaluation pass.
    *("--rollout.temperature", "3", "--eval.full", "3", "--eval.samples", "3"),
    *("--eval.temperature", "1", "--eval.every", "2"),
    # Adam's first steps are signs, and the sign of a rounding error is anything.
    *("--optim.name", "sgd", "--optim.lr", "0.01"),
]


class _Odd:
    """1 for an odd number of characters, so that whole groups are constant now and then.

    Some completions have no verdict, in whichever process they are judged.
    """

    __name__ = "odd"

    def __init__(self, stop: bool):
        self.stop, self.held_out = stop, {r["question"] for r in problems("held_out", 4)}

    def __call__(self, completion, example):
        if self.stop and example["question"] not in self.held_out:
            self.stop = False
            signal.raise_signal(signal.SIGTERM)
        if len(completion) % 11 == 3:
            raise RuntimeError("no verdict")
        return float(len(completion) % 2)


def _task(stop: bool = False) -> Task:
    judge, odd = rewards.correct(), _Odd(stop)
    return Task(
        name="tiny",
        train=problems("train", 16),
        held_out=problems("held_out", 4),
        rewards=(odd, judge, rewards.tag_count_reward),
        weights=(1.0, 1.0, 0.0),
        strict=judge,
        lenient=odd,  # so that an accuracy is neither 0 nor 1
    )


def _launch(folder, root, *words, stop=None, apart=((), ())):
    """Exit codes and output of two processes."""
    flags = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
    path = os.pathsep.join(str(root / name) for name in (".", "tests", "examples"))
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = ["--distributed.coordinator", address, "--distributed.num-processes", "2"]
    running = [
        subprocess.Popen(
            [sys.executable, str(root / "tests" / "test_training_processes.py"),
             str(int(stop == index)), *words, "--run-dir", str(folder), *place,
             "--distributed.process-id", str(index), *apart[index]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        output = [child.communicate(timeout=300)[0] for child in running]
    finally:
        for child in running:
            child.kill()
            child.wait()
    return [child.returncode for child in running], output


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """One process on one device; two processes that are stopped, and then resumed."""
    folder, root = tmp_path_factory.mktemp("runs"), request.config.rootpath
    assert train(parse([*WORDS, "--run-dir", str(folder / "one")]), lambda _: _task()) == 0
    two = folder / "two"
    stopped = _launch(two, root, *WORDS, stop=1)
    saved = json.loads((two / "exit_status.json").read_text())
    resumed = _launch(two, root, *WORDS)
    return folder, stopped, saved, resumed


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs):
    _, (codes, output), saved, _ = runs
    assert codes == [143, 143], output
    assert "SIGTERM: finishing this step" in output[1]
    assert (saved["status"], saved["signal"], saved["step"]) == ("signal", "SIGTERM", 1)


def test_resumed_processes_end_with_the_numbers_of_one(runs):
    folder, _, _, (codes, output) = runs
    assert codes == [0, 0], output
    assert "at step 1" in output[0]
    ours, theirs = (_by_step(folder / name / "metrics.jsonl") for name in ("two", "one"))
    assert ours.keys() == theirs.keys() == {0, 1, 2, 3}
    for step, expected in theirs.items():
        assert ours[step].keys() == expected.keys()
        for name, value in expected.items():
            # What should be zero is rounding, of log-probs of about ten.
            least = 1e-5 if name.startswith(("mismatch/", "policy/kl")) else 1e-6
            np.testing.assert_allclose(
                ours[step][name], value, rtol=1e-5, atol=least, err_msg=f"{step} {name}"
            )
    last = [theirs[step] for step in (1, 2, 3)]
    assert max(line["select/rounds"] for line in last) > 1
    assert sum(line["reward_fn/errors"] for line in last) > 0
    assert all(line["optim/grad_norm"] > 0.01 and line["adv/std"] > 0.1 for line in last)
    assert 0 < theirs[3]["eval_full/acc_lenient"] < 1


def _by_step(path):
    """Metrics of each step, without those that measure this machine, or were not finished."""
    found = {}
    for line in tracking.read_jsonl(path):
        step = found.setdefault(line.pop("step"), {})
        step |= {k: x for k, x in line.items() if not k.startswith(("time/", "perf/", "throughp"))}
    return found


def test_they_leave_the_files_of_one(runs):
    folder, _, _, _ = runs
    names = [{path.name for path in (folder / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1] > {"model", "samples.md", "curve.png", "metrics.jsonl"}
    one, two = (load(str(folder / name / "model")).model for name in ("one", "two"))
    for ours, theirs in zip(*map(_arrays, (two, one)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    samples = [(folder / name / "samples.md").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1]


def _arrays(model):
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(model)]


def test_only_the_first_prints_and_writes(runs):
    _, (_, stopped), _, (_, resumed) = runs
    for output in (stopped[1], resumed[1]):
        # Gloo's own lines, which two threads of it sometimes write into each other.
        lines = [line for line in output.splitlines() if not re.search("Gloo|peer ranks", line)]
        assert lines[0] == "process 1/2"
        rest = [line for line in lines[1:] if not line.startswith(("SIGTERM", "WARNING"))]
        assert rest == [], output
    assert "--mesh fsdp=-1, as there are 2 processes" in resumed[0]
    assert "held-out accuracy on 3 problems" in resumed[0]


def test_different_arguments_are_refused_by_all(tmp_path, root):
    codes, output = _launch(tmp_path, root, *WORDS, apart=((), ("--rollout.samples", "2")))
    assert codes == [1, 1]
    for text in output:
        assert "process 1 was started with other arguments than process 0" in text
    assert "(rollout)" in output[1]


def test_what_does_not_fit_the_mesh_is_refused_before_weights_load(tmp_path):
    words = [*WORDS, "--optim.micro-batch", "3", "--mesh", "fsdp=8", "--run-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="--optim.micro-batch 3 is no multiple of row_shards=8"):
        train(parse([*words, "--model", str(tmp_path / "nowhere")]), lambda _: _task())


def _report_writes(folder: str) -> None:
    """Prints what this process opens for writing in the run folder, Orbax's own files apart."""

    def hook(event, arguments):
        if event == "open" and str(arguments[0]).startswith(folder):
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
            if writes and "checkpoints" not in pathlib.Path(path).parts:
                print("wrote", path, file=sys.stderr, flush=True)

    sys.addaudithook(hook)


if __name__ == "__main__":
    signal.alarm(300)  # whatever happens to the test, nothing of it stays behind
    config = parse(sys.argv[2:])
    if config.distributed.process_id == 1:
        _report_writes(str(config.run_dir))
    sys.exit(train(config, lambda _: _task(stop=sys.argv[1] == "1")))
