"""Engines: order, deaths, ends, and what they refuse. What they sample is in `test_samplers.py`."""

import dataclasses
import gc
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from eqrl import sharding
from eqrl._prompts import pad_prompts
from eqrl.samplers import Decoder, EngineError, OwnProcess, Sampling, engine_of, submit
from eqrl.samplers._process import SharedMemory
from eqrl.samplers._requests import Completion, seeds, to_rollout
from eqrl.samplers._worker import channel
from eqrl.samplers.engine import Held


ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPTS = pad_prompts([[3, 4, 5], [6]], [4, 9], step=4)
SAMPLING = Sampling(3, 12, (1,))
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def engine():
    with OwnProcess() as engine:
        yield engine


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not _alive(pid)


def _pid(engine: OwnProcess) -> int:
    assert engine._process is not None
    return engine._process.pid


def _same(a, b) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "version" or x is None:
            continue
        assert x.dtype == y.dtype, field.name
        np.testing.assert_array_equal(x, y, err_msg=field.name)


# --- what it samples, and when --------------------------------------------------------------------


def test_the_decoder_in_its_own_process_samples_the_same_bits(engine):
    here = Decoder()(tiny_model(), PROMPTS, SAMPLING, key=KEY)
    _same(engine(tiny_model(), PROMPTS, SAMPLING, key=KEY), here)


def test_weights_given_with_a_request_sample_it_whatever_comes_after(engine):
    policies = [tiny_model(jax.random.key(i)) for i in range(4)]
    pending = [
        engine.submit(policy, PROMPTS, SAMPLING, key=KEY, version=10 + i)
        for i, policy in enumerate(policies)
    ]
    for i in (2, 0, 3, 1):  # read in any order
        rollout = pending[i].result()
        _same(rollout, Decoder()(policies[i], PROMPTS, SAMPLING, key=KEY))
        assert set(np.asarray(rollout.version)) == {10 + i}


def test_a_policy_is_pushed_once(engine, monkeypatch):
    sent = []
    send = OwnProcess._send
    monkeypatch.setattr(OwnProcess, "_send", lambda self, x: (sent.append(type(x)), send(self, x)))
    first, second = tiny_model(jax.random.key(21)), tiny_model(jax.random.key(22))
    for policy in (first, first, second, first):
        engine(policy, PROMPTS, SAMPLING, key=KEY)
    assert [kind.__name__ for kind in sent].count("Push") == 3


def test_held_knows_arrays_and_not_their_addresses():
    held, model = Held(), tiny_model()
    assert not held.are(model)
    held.take(model)
    assert held.are(model)
    assert not held.are(jax.tree.map(lambda x: x + 0, model))
    del model
    assert not held.are(tiny_model())


def test_any_sampler_can_be_submitted_to():
    rollout = submit(Decoder(), tiny_model(), PROMPTS, SAMPLING, key=KEY, version=7).result()
    _same(Decoder()(tiny_model(), PROMPTS, SAMPLING, key=KEY), rollout)
    assert set(np.asarray(rollout.version)) == {7}
    assert engine_of(Decoder()) is None


def test_a_policy_of_other_shapes_is_refused(engine):
    engine.start(tiny_model())
    with pytest.raises(ValueError, match="started for another architecture"):
        engine.start(tiny_model(vocab=41))
    _same(
        engine(tiny_model(), PROMPTS, SAMPLING, key=KEY),
        Decoder()(tiny_model(), PROMPTS, SAMPLING, key=KEY),
    )


def test_the_version_is_that_of_the_weights_that_sampled(engine):
    """What is asked in between without one, as evaluation may, changes nothing."""
    first, second = tiny_model(jax.random.key(31)), tiny_model(jax.random.key(32))
    pending = [
        engine.submit(first, PROMPTS, SAMPLING, key=KEY, version=5),
        engine.submit(first, PROMPTS, SAMPLING, key=KEY),
        engine.submit(second, PROMPTS, SAMPLING, key=KEY, version=6),
    ]
    assert [int(p.result().version[0]) for p in pending] == [5, 5, 6]
    os.kill(_pid(engine), signal.SIGSTOP)
    pending = [engine.submit(second, PROMPTS, SAMPLING, key=KEY, version=v) for v in (6, None)]
    os.kill(_pid(engine), signal.SIGKILL)
    assert [int(p.result().version[0]) for p in pending] == [6, 6]


def test_another_dtype_is_refused_and_not_cast(engine):
    engine.start(tiny_model())
    with pytest.raises(ValueError, match="another architecture or dtype"):
        engine.start(tiny_model(dtype=jnp.bfloat16))


def test_settings_of_jax_reach_the_process():
    """They are set here by code, and elsewhere would be what the environment says."""
    usual = Decoder()(tiny_model(), PROMPTS, SAMPLING, key=KEY)
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):  # pyright: ignore
        here = Decoder()(tiny_model(), PROMPTS, SAMPLING, key=KEY)
        with OwnProcess() as engine:
            _same(engine(tiny_model(), PROMPTS, SAMPLING, key=KEY), here)
    assert not np.array_equal(here.tokens, usual.tokens)


def test_weights_that_lie_on_many_devices_are_pushed_whole_and_kept_nowhere_else(engine):
    model = tiny_model(jax.random.key(41), vocab=40)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    spread = sharding.place(model, mesh, model.architecture)
    with OwnProcess() as other:
        _same(
            other(spread, PROMPTS, SAMPLING, key=KEY),
            Decoder()(model, PROMPTS, SAMPLING, key=KEY),
        )
    assert all(getattr(x, "_npy_value", None) is None for x in jax.tree.leaves(spread))


# --- deaths and ends ------------------------------------------------------------------------------


def test_a_dead_engine_is_started_again_and_nothing_is_lost(engine, capfd):
    model = tiny_model()
    engine.start(model)
    before = _pid(engine)
    os.kill(before, signal.SIGSTOP)  # so that it cannot have answered already
    pending = [engine.submit(model, PROMPTS, SAMPLING, key=KEY, version=v) for v in (1, 2)]
    os.kill(before, signal.SIGKILL)
    for one in pending:
        _same(one.result(), Decoder()(model, PROMPTS, SAMPLING, key=KEY))
    assert _pid(engine) != before
    assert "was killed by SIGKILL" in capfd.readouterr().err


def test_an_engine_that_dies_again_and_again_is_an_error_with_its_last_words(monkeypatch):
    engine = OwnProcess(restarts=2)
    engine.start(tiny_model())
    pids = []
    advance = OwnProcess._advance

    def killed(self):
        pids.append(_pid(self))
        os.kill(pids[-1], signal.SIGKILL)
        advance(self)

    pending = engine.submit(tiny_model(), PROMPTS, SAMPLING, key=KEY)
    monkeypatch.setattr(OwnProcess, "_advance", killed)
    with pytest.raises(EngineError, match="own-process engine was killed by SIGKILL.*log /"):
        pending.result()
    assert len(set(pids)) == 3, "started twice again"
    assert all(_gone(pid) for pid in pids)
    monkeypatch.undo()
    with engine:  # and can be used again
        engine(tiny_model(), PROMPTS, SAMPLING, key=KEY)


@pytest.mark.parametrize("prompts", [1, 512], ids=["few words", "more than a socket holds"])
def test_a_slow_engine_is_named_and_ended(prompts):
    engine = OwnProcess()
    engine.start(tiny_model())
    pid, engine.timeout = _pid(engine), 0.2
    os.kill(pid, signal.SIGSTOP)
    many = pad_prompts([[3] * 500] * prompts, range(prompts))
    with pytest.raises(EngineError, match=r"not answered for 0.2 s; raise timeout=.* its log") as e:
        engine(tiny_model(), many, SAMPLING, key=KEY)
    assert _gone(pid)
    assert _log(e).exists()


def _log(error) -> pathlib.Path:
    """The log that a message names."""
    found = re.search(r"/\S+\.log", str(error.value))
    assert found is not None
    return pathlib.Path(found[0])


def test_what_fails_while_loading_is_told_and_leaves_nothing():
    engine = OwnProcess(environment={"JAX_PLATFORMS": "nonexistent"})
    with pytest.raises(EngineError, match="own-process engine failed: .*nonexistent") as error:
        engine.start(tiny_model())
    assert engine._process is None
    assert "Traceback" in _log(error).read_text()


def test_closing_ends_the_process_and_what_is_owed_cannot_be_read():
    engine = OwnProcess()
    pending = engine.submit(tiny_model(), PROMPTS, SAMPLING, key=KEY)
    pid = _pid(engine)
    engine.close()
    assert _gone(pid)
    engine.start(tiny_model())  # another one, which owes nothing to the first
    with pytest.raises(EngineError, match="closed before it had answered"):
        pending.result()
    log = pathlib.Path(engine._process.log)  # pyright: ignore[reportOptionalMemberAccess]
    engine(tiny_model(), PROMPTS, SAMPLING, key=KEY)
    engine.close()
    assert not log.exists(), "where nothing went wrong, nothing stays"
    engine.close()  # again is fine


def test_an_engine_that_nobody_refers_to_any_more_ends():
    engine = OwnProcess()
    engine.start(tiny_model())
    pid = _pid(engine)
    del engine
    gc.collect()
    assert _gone(pid)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout=0 must be seconds above 0"),
        ({"start_timeout": -5}, "start_timeout=-5"),
        ({"restarts": -1}, "restarts=-1"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        OwnProcess(**options)


def test_an_engine_has_a_session_of_its_own(engine):
    """So Ctrl-C at the terminal reaches the trainer, which finishes its step with a live engine."""
    engine.start(tiny_model())
    assert os.getsid(_pid(engine)) == _pid(engine) != os.getsid(0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_no_orphan(how):
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import time, jax; from helpers import tiny_model\n"
        "from eqrl.samplers import OwnProcess\n"
        "engine = OwnProcess(); engine.start(tiny_model())\n"
        "print(engine._process.pid, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    assert _alive(pid)
    trainer.send_signal(how)
    trainer.wait()
    trainer.stdout.close()
    assert _gone(pid)


def test_too_little_shared_memory_is_told_with_the_size():
    with pytest.raises(EngineError, match=r"no 1024\.0 GiB of host memory for a copy"):
        SharedMemory(2**40)


# --- what travels ---------------------------------------------------------------------------------


def _sample() -> channel.Sample:
    rng = np.random.default_rng(0)
    return channel.Sample(
        tokens=rng.integers(0, 9, (3, 4), np.int32),
        positions=np.zeros((3, 4), np.int32),
        ids=np.arange(3),
        key=rng.integers(0, 9, 2).astype(np.uint32),
        key_type="fry",
        seeds=np.zeros(0, np.int32),
        samples=2,
        max_tokens=5,
        stop_ids=[1, 2],
        temperature=0.7,
    )


@pytest.mark.parametrize(
    "message",
    [
        channel.Load({"model_type": "qwen2"}, [{"names": ["a"], "offset": 3}], 12, {"x": None}),
        channel.Push(),
        _sample(),
        channel.Done({"device": "cpu"}),
        channel.Completions(
            np.zeros((2, 3), np.int32), np.ones((2, 3), np.float32), np.ones(2), np.zeros(2, bool)
        ),
        channel.Failed("it is\nover"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_left_and_never_in_half(message):
    stream = io.BytesIO()
    channel.send(stream, message)
    sent = stream.getvalue()
    got = channel.receive(io.BytesIO(sent))
    assert type(got) is type(message)
    for field in dataclasses.fields(message):
        a, b = getattr(message, field.name), getattr(got, field.name)
        np.testing.assert_array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
    for end in {0, 1, len(sent) // 2, len(sent) - 1}:
        with pytest.raises(EOFError):
            channel.receive(io.BytesIO(sent[:end]))


def test_seeds_hang_on_key_prompt_and_sample_alone():
    one = seeds(PROMPTS, SAMPLING, KEY)
    assert len(set(one.tolist())) == 6
    assert one.min() >= 0 and one.max() < 2**31
    turned = jax.tree.map(lambda x: x[::-1], PROMPTS)
    np.testing.assert_array_equal(
        seeds(turned, SAMPLING, KEY).reshape(2, 3)[::-1], one.reshape(2, 3)
    )
    assert not np.intersect1d(seeds(PROMPTS, SAMPLING, jax.random.key(4)), one).size


@pytest.mark.parametrize(
    ("tokens", "logprobs"), [([], []), ([1] * 13, [0.0] * 13), ([1, 2], [0.0])]
)
def test_a_completion_that_breaks_the_contract_is_refused(tokens, logprobs):
    good = Completion([3, 1], [-1.0, -2.0], True)
    with pytest.raises(EngineError, match="where 1 to 12 of each were asked for"):
        to_rollout(PROMPTS, SAMPLING, [good] * 5 + [Completion(tokens, logprobs, False)])
