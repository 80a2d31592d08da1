"""The `openai` backend at a real llama.cpp server: faults, lies, weights, and what it says."""

import pathlib
import subprocess
import sys
import time

import jax
import llama_server
import numpy as np
import pytest
from fault_proxy import FaultProxy
from helpers import tiny_model
from llama_server import LlamaServer
from write_gguf import write_gguf

from eqrl._prompts import pad_prompts
from eqrl._types import Rollout
from eqrl.models import Transformer, load, save, smollm2
from eqrl.samplers import Decoder, EngineError, OpenAI, Sampling
from eqrl.samplers._completions import body, read, sampled
from eqrl.samplers._verify import surprise, verify


PROMPTS = pad_prompts([[3, 4, 5], [6], [7, 8, 9, 10], [14, 15]], range(4), width=8)
SAMPLING = Sampling(4, 24, (1,))
needs_server = pytest.mark.skipif(
    llama_server.missing() is not None, reason=llama_server.missing() or ""
)


@pytest.fixture(scope="module")
def policy() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    """The policy, served; stop token 1."""
    folder = tmp_path_factory.mktemp("served")
    save(policy, folder / "checkpoint")
    write_gguf(folder / "checkpoint", folder / "policy.gguf", [1])
    with LlamaServer(folder / "policy.gguf") as server:
        server.start()
        yield server


def _texts(rollout: Rollout) -> list[list[int]]:
    rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
    return [tokens[mask].tolist() for tokens, mask in rows]


def _ask(engine: OpenAI, policy: Transformer, sampling: Sampling = SAMPLING) -> Rollout:
    return engine(policy, PROMPTS, sampling, key=jax.random.key(1))


# --- faults ---


@pytest.mark.parametrize(
    "faults",
    [["drop"], ["lose"], ["cut"], ["half"], [503], [429], ["slow"]]
    + [["drop", 500, "half", "lose", 429, "slow", "cut", 503]],
    ids=lambda faults: "+".join(map(str, faults)),
)
@needs_server
def test_faults_cost_a_repeat_each_and_change_nothing(server, policy, faults):
    with OpenAI(server.url) as engine:
        expected = _ask(engine, policy)
    with FaultProxy(server.port, faults, delay=5.0) as proxy:
        timeout = 4.0 if "slow" in faults else 60.0
        with OpenAI(proxy.url, timeout=timeout) as engine:
            got = _ask(engine, policy)
        asked = list(proxy.asked)
    assert _texts(got) == _texts(expected)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=5e-5)
    rows = 16
    assert len(asked) == rows + len(faults), "each fault is one more request"
    assert sorted(str(x) for *_, x in asked if x is not None) == sorted(map(str, faults))
    answered = [row[:2] for row in asked if row[2] is None]
    assert len(set(answered)) == len(answered) == rows, "no completion is asked for again"


@needs_server
def test_a_fault_that_stays_ends_in_a_sentence(server, policy):
    with FaultProxy(server.port, [503] * 100) as proxy:
        with OpenAI(proxy.url, retries=1, concurrency=2) as engine:
            with pytest.raises(EngineError, match=r"no answer in 2 tries.*HTTP 503: not now"):
                _ask(engine, policy)
        assert len(proxy.asked) <= 4
        with OpenAI(proxy.url, retries=0) as engine:
            with pytest.raises(EngineError, match="1 tries"):
                _ask(engine, policy)


@needs_server
def test_what_a_retry_cannot_mend_is_not_asked_again(server, policy):
    wrong = pad_prompts([[3] * 300, [4] * 300], [0, 1])
    with FaultProxy(server.port) as proxy, OpenAI(proxy.url, concurrency=1) as engine:
        with pytest.raises(EngineError, match=r"refused with HTTP 400: .*context"):
            engine(policy, wrong, SAMPLING, key=jax.random.key(0))
        assert len(proxy.asked) == 1


def test_nobody_there_is_said_at_once(policy):
    began = time.monotonic()
    url = f"http://127.0.0.1:{llama_server.free_port()}/v1"
    with OpenAI(url) as engine:
        with pytest.raises(EngineError, match=f"nothing answers at {url}; start the server"):
            engine.start(policy)
        with pytest.raises(EngineError, match="nothing answers"):
            _ask(engine, policy)
    assert time.monotonic() - began < 5


@needs_server
def test_a_server_that_dies_is_an_error_and_one_that_is_back_goes_on(server, policy):
    with OpenAI(server.url, retries=1) as engine:
        before = _ask(engine, policy)
        server.stop()
        with pytest.raises(EngineError, match="Connection refused"):
            _ask(engine, policy)
        server.start()
        assert _texts(_ask(engine, policy)) == _texts(before)


@needs_server
def test_close_ends_what_is_under_way_and_the_next_use_starts_anew(server, policy):
    with FaultProxy(server.port, ["slow"] * 16, delay=3.0) as proxy:
        engine = OpenAI(proxy.url, checks=0)
        asked = engine.submit(policy, PROMPTS, SAMPLING, key=jax.random.key(1))
        session = engine._session
        assert session is not None and session.folder.is_dir()
        time.sleep(0.3)
        began = time.monotonic()
        engine.close()
        with pytest.raises(EngineError, match="closed before"):
            asked.result()
        assert time.monotonic() - began < 2
        assert not session.folder.exists()
    engine.url = server.url
    with engine:
        assert len(_texts(_ask(engine, policy))) == 16


# --- what the server must not do ---


@needs_server
def test_a_truncated_distribution_is_caught(server, policy):
    with FaultProxy(server.port, asks=lambda body: body | {"top_k": 3}) as proxy:
        with OpenAI(proxy.url) as engine:
            with pytest.raises(EngineError, match="too likely.*turn off top-k"):
                _ask(engine, policy)
        with OpenAI(proxy.url) as engine:  # llama.cpp's own numbers are then those of the rest
            with pytest.raises(EngineError, match="none is lower, as after a top-k"):
                _ask(engine, policy, Sampling(4, 24, (1,), 0.7))


@needs_server
def test_a_penalty_is_caught(server, policy):
    with FaultProxy(server.port, asks=lambda body: body | {"logit_bias": [[9, 6.0]]}) as proxy:
        with OpenAI(proxy.url, cut_at_stop=True) as engine:
            with pytest.raises(EngineError, match="too unlikely to be drawn"):
                _ask(engine, policy)


@needs_server
def test_logprobs_at_another_temperature_are_caught(server, policy):
    unscaled = lambda body: body | {"post_sampling_probs": False}  # noqa: E731
    with FaultProxy(server.port, asks=unscaled) as proxy, OpenAI(proxy.url) as engine:
        with pytest.raises(EngineError, match="at temperature 1, so have it answer .* 0.7"):
            _ask(engine, policy, Sampling(4, 24, (1,), 0.7))
    colder = lambda body: body | {"temperature": 0.1}  # noqa: E731
    with FaultProxy(server.port, asks=colder) as proxy, OpenAI(proxy.url) as engine:
        with pytest.raises(EngineError, match="too likely.* any temperature of its own"):
            _ask(engine, policy, Sampling(4, 60, (1,)))


@needs_server
def test_other_weights_are_caught(server):
    with OpenAI(server.url) as engine:
        with pytest.raises(EngineError, match="it has other weights than the policy"):
            _ask(engine, tiny_model(jax.random.key(8)))


@needs_server
def test_text_that_was_tokenised_again_is_caught(server, policy):
    def other(answer):
        content = answer["choices"][0]["logprobs"]["content"]
        if len(content) > 2:
            content[1]["id"] = (content[1]["id"] + 1) % 30 + 2
        return answer

    with FaultProxy(server.port, answers=other) as proxy, OpenAI(proxy.url) as engine:
        with pytest.raises(EngineError, match="continues other tokens than it answers"):
            _ask(engine, policy)


@needs_server
def test_a_server_without_ids_or_logprobs_is_refused_at_start(server, policy):
    def no_ids(answer):
        for entry in answer["choices"][0]["logprobs"]["content"]:
            del entry["id"]
        return answer

    def no_logprobs(answer):
        answer["choices"][0]["logprobs"] = None
        return answer

    for answers, said in ((no_ids, "offers no token ids"), (no_logprobs, "no log-probs")):
        with FaultProxy(server.port, answers=answers) as proxy, OpenAI(proxy.url) as engine:
            with pytest.raises(EngineError, match=said):
                engine.start(policy)


@needs_server
def test_stop_tokens_of_the_server_and_of_the_request_must_agree(server, policy):
    with OpenAI(server.url) as engine:
        with pytest.raises(EngineError, match=r"does not stop at token \d+ of stop_ids=\(1, 4, 5"):
            _ask(engine, policy, Sampling(4, 24, (1, *range(4, 20))))
    with OpenAI(server.url) as engine:
        with pytest.raises(EngineError, match=r"stops at token 1, which is not in stop_ids=\(\)"):
            _ask(engine, policy, Sampling(64, 24, ()))


@needs_server
def test_a_completion_that_ends_with_the_context_is_refused(server, policy):
    with OpenAI(server.url) as engine:
        with pytest.raises(EngineError, match="likely at the end of its context"):
            # It has 256 positions.
            prompts = pad_prompts([[3] * 252], [0])
            engine(policy, prompts, Sampling(16, 50, (1,)), key=jax.random.key(0))


# --- weights ---


@needs_server
def test_another_policy_needs_a_reload(server, policy):
    with OpenAI(server.url) as engine:
        _ask(engine, policy)
        with pytest.raises(EngineError, match="give reload="):
            _ask(engine, tiny_model(jax.random.key(8)))
        _ask(engine, policy)


@needs_server
def test_requests_are_sampled_by_the_weights_given_with_them(policy, tmp_path):
    new = tiny_model(jax.random.key(8))
    with LlamaServer(tmp_path / "policy.gguf") as server:
        with OpenAI(
            server.url, reload=server.reload(1), folder=str(tmp_path / "weights"), checks=0,
            start_timeout=30.0,
        ) as engine:  # fmt: skip
            asked = [
                engine.submit(x, PROMPTS, SAMPLING, key=jax.random.key(1), version=version)
                for version, x in enumerate((policy, new, policy))
            ]
            first, second, third = (x.result() for x in asked)
            folders = list((tmp_path / "weights").glob("*/*"))
            assert [x.name for x in folders] == ["weights-2"], "old weights are deleted"
        assert list((tmp_path / "weights").iterdir()) == []
    for model, rollout in ((policy, first), (new, second), (policy, third)):
        verify(model, rollout, SAMPLING, tolerance=1e-4, who="it")
    assert _texts(first) == _texts(third) != _texts(second)
    assert np.asarray(second.version).tolist() == [1] * 16


@needs_server
def test_a_reload_that_does_nothing_is_caught(server, policy):
    nothing = (sys.executable, "-c", "pass", "{folder}")
    with OpenAI(server.url, reload=nothing) as engine:
        _ask(engine, policy)
        with pytest.raises(EngineError, match="other weights than the policy"):
            _ask(engine, tiny_model(jax.random.key(8)))


@needs_server
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('no room'); sys.exit('the disk is full')", r"status 1: .*disk is full"),
        ("import time; time.sleep(60)", "took more than 1 s"),
    ],
)
def test_a_reload_that_fails_says_why(server, policy, code, said):
    command = (sys.executable, "-c", code, "{folder}")
    with OpenAI(server.url, reload=command, start_timeout=1.0) as engine:
        with pytest.raises(EngineError, match=said):
            engine.start(policy)


def test_a_reload_that_does_not_start_says_so(policy):
    with OpenAI("http://127.0.0.1:1/v1", reload=("/nowhere/reload", "{folder}")) as engine:
        with pytest.raises(EngineError, match="does not start: .*nowhere"):
            engine.start(policy)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "must be an http"),
        ({"reload": "./reload.sh {folder}"}, "tuple of strings"),
        ({"reload": ("./reload.sh",)}, "folder"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout": 0.0}, "timeout=0"),
    ],
)
def test_bad_options_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        OpenAI(**{"url": "http://127.0.0.1:8000/v1", **options})


# --- other layouts, which no server here answers ---


def _choice(**fields):
    return {"choices": [{"finish_reason": "length", "text": "x", **fields}]}


def test_the_layouts_of_vllm_and_sglang_are_read():
    said = {"tokens": ["token_id:5", "token_id:7"], "token_logprobs": [-0.5, -1.5]}
    assert sampled(_choice(logprobs=said), "it") == ([5, 7], [-0.5, -1.5], "length")
    words = said | {"tokens": ["a", "b"]}
    assert sampled(_choice(logprobs=words, token_ids=[5, 7]), "it")[0] == [5, 7]
    with pytest.raises(EngineError, match="no token ids"):
        sampled(_choice(logprobs=words), "it")
    with pytest.raises(EngineError, match="3 ids and 2 log-probs"):
        sampled(_choice(logprobs=words, token_ids=[5, 7, 9]), "it")
    with pytest.raises(EngineError, match="layout"):
        sampled({"error": "x"}, "it")
    with pytest.raises(EngineError, match="amid a character"):
        sampled(_choice(logprobs=said) | {"usage": {"completion_tokens": 3}}, "it")


def test_what_follows_a_stop_token_is_cut_on_demand():
    said = {"tokens": [], "token_logprobs": [-0.5, -1.5, -2.5]}
    answer = _choice(logprobs=said, token_ids=[5, 7, 9])
    sampling = Sampling(1, 3, (7,))
    with pytest.raises(EngineError, match="cut_at_stop=True"):
        read(answer, sampling, 0, cut_at_stop=False, who="it")
    cut = read(answer, sampling, 2, cut_at_stop=True, who="it")
    assert (list(cut.tokens), list(cut.logprobs), cut.stopped, cut.version) == (
        [5, 7], [-0.5, -1.5], True, 2,
    )  # fmt: skip


def test_greedy_asks_for_logprobs_at_temperature_1():
    for temperature, scaled in ((0, False), (1.0, False), (0.7, True)):
        asked = body("m", [1], 3, Sampling(1, 2, (), temperature))
        assert asked["post_sampling_probs"] is scaled


# --- the check itself ---


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 1.3])
def test_the_check_lets_honest_samples_pass(policy, temperature):
    sampling = Sampling(4, 24, (1,), temperature)
    for seed in range(10):
        rollout = Decoder()(policy, PROMPTS, sampling, key=jax.random.key(seed))
        verify(policy, rollout, sampling, tolerance=1e-4, who="it")


def _drawn(rng, logits, kept):
    """`d`, variance and entropy of draws from the most likely `kept` entries of each row."""
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(logp)
    entropy = -(p * logp).sum(axis=1)
    variance = (p * logp**2).sum(axis=1) - entropy**2
    noise = np.where(np.argsort(np.argsort(-logits)) < kept, rng.gumbel(size=logits.shape), -np.inf)
    token = np.argmax(logp + noise, axis=1)
    return logp[np.arange(len(token)), token] + entropy, variance, entropy


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0, 10.0, 30.0])
def test_false_alarms_are_as_rare_as_promised(scale):
    """Also for policies that are nearly certain, where a rare token is a very long way off."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(1000):
        drawn = _drawn(rng, scale * rng.normal(size=(int(rng.integers(1, 100)), 50)), 50)
        worst = max(worst, *surprise(*drawn))
    # The largest of 2,000 exponentials is about log(2000) = 7.6; the alarm is at 18.
    assert worst < 14


@pytest.mark.parametrize(("scale", "kept"), [(1.0, 10), (2.0, 3), (3.0, 2)])
def test_truncation_is_seen_in_three_hundred_tokens(scale, kept):
    rng = np.random.default_rng(0)
    for _ in range(100):
        high, low = surprise(*_drawn(rng, scale * rng.normal(size=(300, 50)), kept))
        assert high > 18 and low == 0


# --- a quantised server ---


@needs_server
def test_smollm2_in_four_bits_agrees_to_its_rounding():
    try:
        file = smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    policy = load(file).model
    prompts = pad_prompts([[504, 3575, 282, 4649, 314]], [0])
    # Its log-probs were 0.057 nats off on average over 214 tokens, and 0.5 at most.
    sampling = Sampling(2, 8, (0, 2))
    with LlamaServer(file, slots=2, exact=False) as server:
        server.start()
        with OpenAI(server.url, tolerance=0.15) as engine:
            rollout = engine(policy, prompts, sampling, key=jax.random.key(0))
    assert len(_texts(rollout)) == 2


@needs_server
def test_no_server_is_left_behind(server):
    """The helper's own promise: the server ends with who started it, however that ends."""
    code = (
        "import sys, os, pathlib; sys.path.insert(0, sys.argv[1]); import llama_server\n"
        "s = llama_server.LlamaServer(pathlib.Path(sys.argv[2])); s.start()\n"
        "print(s._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    words = [sys.executable, "-c", code, str(llama_server.FOLDER), str(server.file)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    stat, deadline = pathlib.Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 10
    # A zombie that nobody has fetched yet is dead too.
    while stat.exists() and ") Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not stat.exists() or ") Z " in stat.read_text()
