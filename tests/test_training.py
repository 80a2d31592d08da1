"""The whole loop, tiny: every algorithm runs, faults cost little, and nothing is lost."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import evaluation
import jax
import numpy as np
import pytest
import yaml
from asking import ask
from config import batch_plan, parse
from helpers import tiny_model
from layout import Meshes
from task import Task
from training import train
from word_problems import problems

import eqrl
from eqrl import rewards, samplers, sharding, tracking
from eqrl.models import load


ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = [
    *("--rollout.prompts", "2", "--rollout.samples", "4", "--rollout.max-tokens", "8"),
    *("--eval.full", "2", "--eval.every", "0"),
    # Hot enough that the completions of a prompt differ.
    *("--rollout.temperature", "3"),
]  # fmt: skip
ALGORITHMS = [
    "reinforce", "ppo", "grpo", "rloo", "dapo", "reinforce++", "reinforce++-baseline", "dr_grpo",
    # Of the others, those that ask something new of the loop: a greedy completion, old log-probs
    # and work done before the split, reward components, another critic's target.
    "remax", "m2po", "gdpo", "vapo",
]  # fmt: skip


def _length(completion, example):
    """A reward that differs between short random texts, as correctness would not."""
    return float(len(completion) % 7)


def _task(*functions):
    judge = rewards.correct()
    functions = functions or (judge, _length)
    return Task(
        name="tiny",
        train=problems("train", 8),
        held_out=problems("held_out", 4),
        rewards=functions,
        weights=(1.0,) * len(functions),
        strict=judge,
        lenient=judge,
    )


@pytest.mark.parametrize(
    ("passes", "mesh"), [("2", None), ("3", None), ("5", None), ("2", "fsdp=8")]
)
def test_passes_change_no_completion(passes, mesh):
    """Three passes of two prompts: the last is short. On the mesh, each has eight."""
    policy = tiny_model()
    prompts = eqrl.pad_prompts([[3, 4], [5], [6, 7, 8], [9, 9], [10]], range(5), step=4)
    decoder, sampling = samplers.Decoder(), samplers.Sampling(2, 6, (0, 1))
    where = None if mesh is None else sharding.make_mesh(mesh)
    config = parse(["--rollout.prompts", "5", "--rollout.samples", "2", "--rollout.passes", passes])
    size, key = batch_plan(config).prompts_per_pass, jax.random.key(3)
    got = ask(
        decoder,
        policy,
        prompts,
        sampling,
        key=key,
        size=size,
        meshes=Meshes(where, where),
        version=0,
    ).result()
    want = decoder(policy, prompts, sampling, key=key)
    got = dataclasses.replace(got, version=None)
    # Log-probs of another batch size may round otherwise.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, want)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_mesh_changes_no_number(tmp_path):
    """Minibatches of four rows on four row shards, and heads over two devices."""
    words = [*TINY, "--algo.name", "ppo", "--steps", "2", "--algo.minibatches", "2"]
    found = []
    for name, mesh in (("one", []), ("eight", ["--mesh", "fsdp=4,tensor=2"])):
        folder = tmp_path / name
        train(parse([*words, *mesh, "--run-dir", str(folder)]), lambda _: _task())
        found.append([r for r in _metrics(folder) if "loss/policy" in r])
    assert len(found[0]) == len(found[1]) == 2
    for one, eight in zip(*found, strict=True):
        names = [n for n in one if not n.startswith(("time/", "perf/", "throughput/"))]
        for metric in names:
            np.testing.assert_allclose(
                eight[metric], one[metric], rtol=2e-3, atol=1e-5, err_msg=metric
            )


def _metrics(folder):
    return tracking.read_jsonl(pathlib.Path(folder) / "metrics.jsonl")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_moves_the_policy_and_leaves_a_whole_folder(name, tmp_path, capsys):
    config = parse([*TINY, "--run-dir", str(tmp_path / "run"), "--algo.name", name, "--steps", "2"])
    assert train(config, lambda config: _task()) == 0
    folder = tmp_path / "run"
    status = json.loads((folder / "exit_status.json").read_text())
    assert (status["status"], status["step"]) == ("success", 2)
    before, after = load("examples/demo_model").model, load(str(folder / "model")).model
    assert not np.array_equal(np.asarray(before.layers.up.weight), after.layers.up.weight)
    steps = [line for line in _metrics(folder) if "loss/total" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["mismatch/logp_abs_max"] < 1e-4
        assert line["optim/grad_norm"] > 0 and line["optim/skipped_nonfinite"] == 0
        assert 0 < line["policy/entropy"] < 10
    assert ("value/explained_variance" in steps[0]) == (name in ("ppo", "vapo"))
    assert ("select/rounds" in steps[0]) == (name == "dapo")
    assert yaml.safe_load((folder / "config.yaml").read_text())["algo"]["name"] == name
    assert (folder / "curve.png").stat().st_size > 5_000
    assert "held-out accuracy" in capsys.readouterr().out


def test_the_ratio_can_be_against_the_sampler(tmp_path):
    words = ["--steps", "1", "--algo.name", "dppo", "--algo.old-logprobs", "sampler"]
    words += ["--eval.full", "None", "--run-dir", str(tmp_path / "run")]
    assert train(parse([*TINY, *words]), lambda config: _task()) == 0
    (line,) = [line for line in _metrics(tmp_path / "run") if "loss/total" in line]
    # The sampler's numbers are the trainer's, and now stand for them to the last digit.
    assert line["mismatch/logp_abs_max"] == 0
    assert 0 < abs(line["policy/ratio_max"] - 1)


def test_gdpo_weighs_components_as_the_task_does(tmp_path):
    words = ["--steps", "0", "--algo.name", "gdpo", "--eval.full", "None"]
    config = parse([*TINY, *words, "--run-dir", str(tmp_path / "run")])
    task = dataclasses.replace(_task(), weights=(1.0, 0.25))
    assert train(config, lambda config: task) == 0
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["derived"]["algorithm"]["advantage"] == "gdpo(1.0, 0.25) | batch_norm()"


def test_a_reward_that_raises_or_hangs_costs_samples_and_never_the_run(tmp_path):
    calls = []

    def flaky(completion, example):
        calls.append(completion)
        if len(calls) % 5 == 1:
            raise RuntimeError("no verdict")
        if len(calls) == 3:
            time.sleep(60)
        return float(len(completion) % 3)

    words = ["--steps", "1", "--reward.timeout", "0.2", "--run-dir", str(tmp_path / "run")]
    assert train(parse([*TINY, *words]), lambda config: _task(flaky)) == 0
    (line,) = [line for line in _metrics(tmp_path / "run") if "loss/total" in line]
    failed = line["reward_fn/errors"] + line["reward_fn/timeouts"]
    assert failed >= 1
    assert line["completion/rows"] == 8 - failed


def test_bad_input_is_one_sentence_and_recorded(tmp_path):
    words = ["--model", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^error: .*nowhere.*$") as caught:
        train(parse([*TINY, *words]), lambda config: _task())
    status = json.loads((tmp_path / "run" / "exit_status.json").read_text())
    assert (status["status"], status["message"]) == ("exception", str(caught.value))


def _command(folder, *words):
    return [sys.executable, "examples/gsm8k.py", *TINY, "--run-dir", str(folder), *words]


def _start(folder, *words):
    return subprocess.Popen(
        _command(folder, *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def _until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the run ended before it printed {text!r}")


# PPO with a critic, old log-probs, minibatch order, a schedule, and a state in the advantage, the
# target and the objective: all of it must come back.
RESUMED = (
    *("--algo.name", "ppo", "--steps", "4", "--optim.schedule", "warmup_cosine"),
    *("--algo.advantage", "adaptive_kl_penalty(0.05) | gae() | whiten()"),
    *("--algo.objective", "clipped() + 0.5 * value_loss() + adaptive_entropy(9) * entropy_bonus()"),
)


def test_kill_and_resume_equal_an_uninterrupted_run_bit_for_bit(tmp_path):
    whole = subprocess.run(
        _command(tmp_path / "whole", *RESUMED), cwd=ROOT, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    words = (*RESUMED, "--checkpoint.every", "2")
    with _start(tmp_path / "cut", *words) as first:
        _until(first, "step 3/4")
        first.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / "cut/exit_status.json").read_text())["status"] == "running"
    second = subprocess.run(
        _command(tmp_path / "cut", *words), cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stdout and "step 3/4" in second.stdout
    assert "step 2/4" not in second.stdout
    for file in ("model/model.safetensors", "samples.md"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    deterministic = ("loss/", "adv/", "reward/", "policy/", "optim/", "eval_full/acc", "data/")
    runs = [
        [line for line in _metrics(tmp_path / name) if "time/ckpt" not in line]
        for name in ("whole", "cut")
    ]
    for a, b in zip(*runs, strict=True):
        keep = {k for k in a if k.startswith(deterministic)}
        assert {k: a[k] for k in keep} == {k: b[k] for k in keep}


def test_sigterm_finishes_the_step_saves_and_says_so(tmp_path):
    with _start(tmp_path / "run", "--steps", "10000") as process:
        _until(process, "step     2/10000")
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM, output
    status = json.loads((tmp_path / "run/exit_status.json").read_text())
    assert (status["status"], status["signal"]) == ("signal", "SIGTERM")
    saved = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdecimal()}
    assert max(saved) == status["step"] == _metrics(tmp_path / "run")[-1]["step"]


def test_a_signal_during_an_evaluation_loses_nothing(tmp_path, monkeypatch):
    def asked(self, policy):
        signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(evaluation.Evaluator, "light", asked)
    words = ["--steps", "3", "--eval.every", "1", "--run-dir", str(tmp_path / "run")]
    assert train(parse([*TINY, *words]), lambda config: _task()) == 128 + signal.SIGTERM
    status = json.loads((tmp_path / "run/exit_status.json").read_text())
    assert (status["status"], status["step"]) == ("signal", 1)
    assert (tmp_path / "run/checkpoints/1").is_dir()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--eval.full", "None"]
    train(parse([*TINY, *words, "--steps", "1"]), lambda config: _task())
    with pytest.raises(SystemExit, match="seed is 0, this run's 7"):
        train(parse([*TINY, *words, "--steps", "2", "--seed", "7"]), lambda config: _task())
