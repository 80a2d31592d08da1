"""The examples' side of sampling: backends by text, batches ahead of training, failing engines."""

import dataclasses
import json
import re

import config as cli
import evaluation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import Ahead, Batch, ask
from backends import build_backend
from stepping import _aged, _fresh
from test_training import TINY, _metrics, _task
from training import train

import eqrl
from eqrl import samplers
from eqrl.models import load


# --- backends by text -----------------------------------------------------------------------------


def test_a_name_or_a_name_with_options():
    assert isinstance(build_backend("naive", {}), samplers.Decoder)
    engine = build_backend("own-process(timeout=60, environment={'A': 'b'})", {})
    assert isinstance(engine, samplers.OwnProcess)
    assert (engine.timeout, engine.environment) == (60, {"A": "b"})
    assert isinstance(
        build_backend("own_thing()", {"own_thing": samplers.Decoder}), samplers.Decoder
    )


def test_what_the_run_knows_is_given_to_backends_that_want_it():
    known = {"context_length": 321}
    engine = build_backend("sglang-jax(tp_size=2)", {}, **known)
    assert isinstance(engine, samplers.SGLangJax)
    assert (engine.context_length, engine.tp_size) == (321, 2)
    given = build_backend("sglang-jax(context_length=99)", {}, **known)
    assert isinstance(given, samplers.SGLangJax) and given.context_length == 99
    build_backend("naive", {}, **known)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vllm", "'vllm' is not known; nearest is"),
        ("sglang_jaxx", "nearest is 'sglang-jax'"),
        ("naive(temperature=1)", "no option 'temperature'; it has none"),
        ("own-process(time=1)", "no option 'time'; it has environment, start_timeout, timeout"),
        ("own-process(60)", "does not read"),
        ("own-process(timeout=open('x'))", "does not read"),
        ("own-process(timeout=6", "does not read"),
        ("sglang-jax(dtype='float8')", "dtype='float8' must be"),
    ],
)
def test_backends_that_do_not_read_are_refused(text, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.parse(["--rollout.backend", text])
    assert exit.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--rollout.backend" in said and words in said


def test_a_backend_of_a_plugin_is_found_by_its_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom eqrl import samplers\n"
        "@dataclasses.dataclass\nclass Mine:\n    loud: bool = False\n"
        "    def __call__(self, *args, **kwargs):\n"
        "        return samplers.Decoder()(*args, **kwargs)\n"
        "@dataclasses.dataclass(eq=False)\nclass Theirs(samplers.OwnProcess):\n    more: int = 1\n"
    )
    for text in ("Mine(loud=True)", "Theirs(more=2, timeout=9)"):
        config = cli.parse(["--plugins", str(file), "--rollout.backend", text])
        assert config.rollout.backend == text


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("openai(url='http://127.0.0.1:1/v1')", "give reload=, or --steps 0"),
        ("sglang-jax(python_path='/nowhere')", "install_sglang_jax"),
    ],
)
def test_what_could_only_fail_later_is_refused_before_the_model_is_loaded(
    backend, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("training._load", lambda *_: pytest.fail("the model was loaded"))
    config = cli.parse([*TINY, "--rollout.backend", backend, "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=said):
        train(config, lambda _: _task())


def test_tools_and_overlap_do_not_go_together(tmp_path):
    words = [*TINY, *SAMPLER, "--rollout.overlap", "1", "--run-dir", str(tmp_path)]
    task = dataclasses.replace(_task(), around=lambda sampler, _: sampler)
    with pytest.raises(SystemExit, match="sampled turn by turn"):
        train(cli.parse(words), lambda _: task)


def test_a_context_that_the_run_does_not_fit_is_refused_with_one_that_does(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers.SGLangJax, "python", lambda self: "python")
    words = [*TINY, "--rollout.backend", "sglang-jax(context_length=20)"]
    with pytest.raises(SystemExit, match=r"too short for this run; give context_length=\d+"):
        train(cli.parse([*words, "--run-dir", str(tmp_path)]), lambda _: _task())


# --- ahead of training ----------------------------------------------------------------------------


def _asked_of(ahead: Ahead, steps: range, stream: list[int]) -> list[list[tuple[int, list[int]]]]:
    """For each step, the batches it asks for: their steps and rows."""
    found = []
    for step in steps:
        asked = []

        def ask(step: int, rows: list[int] | None, asked=asked) -> Batch:
            rows = [stream.pop(0)] if rows is None else rows
            asked.append((step, rows))
            return Batch(rows, None, step)  # pyright: ignore[reportArgumentType]

        assert ahead.take(step, ask).asked == step, "a step gets its own batch"
        found.append(asked)
    return found


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_a_batch_is_asked_for_so_many_steps_before_its_own_and_none_after_the_last(size):
    last = 5
    asked = _asked_of(Ahead(size, last), range(last), [*range(100, 120)])
    by_step = {step: (when, rows) for when, batches in enumerate(asked) for step, rows in batches}
    assert sorted(by_step) == [*range(last)]
    for step, (when, rows) in by_step.items():
        assert when == max(0, step - size)
        assert rows == [100 + step], "in the order of the data, whatever the overlap"


def test_what_was_under_way_at_a_checkpoint_is_asked_for_again_and_nothing_twice():
    stream = [*range(100, 120)]
    ahead = Ahead(2, 6)
    _asked_of(ahead, range(3), stream)
    assert ahead.rows() == [[103], [104]]
    again = Ahead(2, 6, ahead.rows())
    assert again.rows() == ahead.rows(), "also if it is interrupted before its first step"
    asked = _asked_of(again, range(3, 6), stream)
    assert [x for batches in asked for x in batches] == [(3, [103]), (4, [104]), (5, [105])]


def test_what_is_older_than_the_bound_trains_nothing_and_is_counted():
    config = cli.parse(
        ["--rollout.overlap", "2", "--algo.minibatches", "2", "--algo.old-logprobs", "sampler"]
    )
    mask = jnp.ones((4, 3), bool).at[3].set(False)
    rollout = eqrl.Rollout(
        tokens=jnp.zeros((4, 3), jnp.int32),
        mask=mask,
        positions=jnp.zeros((4, 3), jnp.int32),
        logprobs=jnp.zeros((4, 3)),
        group=jnp.arange(4),
        truncated=jnp.zeros(4, bool),
        version=jnp.asarray([10, 6, 5, 0]),
    )

    class Run:
        pass

    run = Run()
    run.config = config  # pyright: ignore[reportAttributeAccessIssue]
    ages: list[np.ndarray] = []
    kept = _fresh(run, rollout, 10, ages)  # pyright: ignore[reportArgumentType]
    # Two steps of two updates: 4 updates old may stay, 5 may not; an empty row has no age.
    assert np.asarray(kept.mask).any(axis=1).tolist() == [True, True, False, False]
    assert _aged(run, ages) == {  # pyright: ignore[reportArgumentType]
        "rollout/age_mean": pytest.approx(3.0),
        "rollout/age_max": 5.0,
        "rollout/stale_frac": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--algo.name", "grpo"], "--algo.old-logprobs sampler"),
        (["--algo.name", "reinforce"], '--algo.objective "tis(2.0) * (reinforce())"'),
        (
            ["--algo.name", "reinforce", "--algo.old-logprobs", "sampler"],
            '--algo.objective "tis(2.0) * (reinforce())"',
        ),
    ],
)
def test_overlap_without_a_correction_is_refused_with_the_remedy(words, remedy, capsys):
    with pytest.raises(SystemExit):
        cli.parse([*words, "--rollout.overlap", "1"])
    said = " ".join(capsys.readouterr().err.split())
    assert "--rollout.overlap 1" in said and remedy in said
    flag, value = re.match(r'(\S+) "?([^"]*)"?', remedy).groups()  # pyright: ignore
    base = words[:2]
    assert cli.parse([*base, "--rollout.overlap", "1", flag, value]).rollout.overlap == 1


SAMPLER = ["--algo.name", "grpo", "--algo.old-logprobs", "sampler"]


def test_overlap_trains_on_older_policies_and_depends_on_no_clock(tmp_path):
    """Sampled here and in another process: the same numbers at every step; ages of one update."""
    found = []
    for backend in ("naive", "own-process"):
        folder = tmp_path / backend
        words = [*TINY, *SAMPLER, "--steps", "3", "--rollout.overlap", "1"]
        config = cli.parse([*words, "--rollout.backend", backend, "--run-dir", str(folder)])
        assert train(config, lambda _: _task()) == 0
        found.append([r for r in _metrics(folder) if "loss/policy" in r])
    for here, there in zip(*found, strict=True):
        clock = re.compile(r"^(time|perf|throughput|timing)/")
        assert {k: v for k, v in here.items() if not clock.match(k)} == {
            k: v for k, v in there.items() if not clock.match(k)
        }
    assert [r["rollout/age_mean"] for r in found[0]] == [0, 1, 1]
    assert [r["policy/ratio_max"] > 1.001 for r in found[0]] == [False, True, True]


# --- failing engines ------------------------------------------------------------------------------


class Flaky(samplers.Engine):
    """The decoder, until it has been asked `good` times; then it is dead."""

    def __init__(self, good: int):
        self.good = good

    def start(self, policy) -> None:
        pass

    def submit(self, policy, prompts, sampling, *, key, version=None):
        self.good -= 1
        if self.good < 0:
            raise samplers.EngineError("the flaky engine is dead; it was asked too often")
        return samplers.submit(
            samplers.Decoder(), policy, prompts, sampling, key=key, version=version
        )

    def close(self) -> None:
        pass


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_a_dead_engine_costs_no_step_and_no_problem(tmp_path, monkeypatch, overlap):
    """The run ends with the engine's words, and its continuation trains on what would have come."""
    engine = Flaky(10**6)
    monkeypatch.setattr("backends.build_backend", lambda *_, **__: engine)
    taken: dict[str, list] = {"whole": [], "parts": []}
    now = "whole"
    take = eqrl.data.PromptStream.take

    def spy(self, count):
        rows = take(self, count)
        taken[now].append([int(i) for i in rows])
        return rows

    monkeypatch.setattr(eqrl.data.PromptStream, "take", spy)
    words = [*TINY, *SAMPLER, "--steps", "4", "--rollout.overlap", overlap]

    def run(name: str) -> None:
        config = cli.parse([*words, "--run-dir", str(tmp_path / name)])
        train(config, lambda _: _task())

    run("whole")
    now, engine = "parts", Flaky(4)
    with pytest.raises(SystemExit, match="error: the flaky engine is dead"):
        run("parts")
    status = json.loads((tmp_path / "parts" / "exit_status.json").read_text())
    assert status["step"] >= 1
    engine = Flaky(10**6)
    run("parts")
    steps = [r["step"] for r in _metrics(tmp_path / "parts") if "loss/policy" in r]
    assert steps == [1, 2, 3, 4]
    if overlap == "0":  # strictly on-policy: bit for bit the run that was not interrupted
        a, b = (load(tmp_path / name / "model").model for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    trained = [rows for i, rows in enumerate(taken["parts"]) if rows not in taken["parts"][:i]]
    assert trained == taken["whole"]


def test_evaluation_asks_the_engine_too(tmp_path, monkeypatch):
    engine = Flaky(10**6)
    monkeypatch.setattr("backends.build_backend", lambda *_, **__: engine)
    asked = []

    def spy(sampler, *args, **kwargs):
        asked.append(sampler)
        return ask(sampler, *args, **kwargs)

    monkeypatch.setattr(evaluation, "ask", spy)
    config = cli.parse([*TINY, "--steps", "0", "--run-dir", str(tmp_path)])
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, full=2))
    train(config, lambda _: _task())
    assert asked and all(one is engine for one in asked)
