"""The `openai` backend at a real llama.cpp server: faults, lies, weights, and what it says."""

import http.server
import pathlib
import re
import socket
import subprocess
import sys
import threading
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
from eqrl.samplers import Decoder, EngineError, OpenAI, Sampling, _session
from eqrl.samplers._completions import body, read, sampled
from eqrl.samplers._fingerprint import Fingerprints
from eqrl.samplers._http import Client
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


def _refusal(*args, **options) -> str:
    """What `start` says, within a second or so."""
    began = time.monotonic()
    with OpenAI(*args, **options) as engine, pytest.raises(EngineError) as caught:
        engine.start(tiny_model())
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    return str(caught.value)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The port of a server of files, which is no completions server."""
    folder, port = tmp_path_factory.mktemp("pages"), llama_server.free_port()
    (folder / "v1").mkdir()
    (folder / "v1" / "models").write_text("<html>\n<body>\nhello\n</html>\n" * 99)
    words = [sys.executable, "-m", "http.server", str(port), "-b", "127.0.0.1", "-d", str(folder)]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.05)
    yield port
    child.kill()
    child.wait()


def test_another_kind_of_server_is_said_at_once_and_in_one_line(pages):
    root = f"http://127.0.0.1:{pages}"
    asked = r"is url= the root of the API, which usually ends in /v1\?$"
    assert re.search("HTTP 404 to /models; " + asked, _refusal(root))
    assert re.search("HTTP 501 to /completions; " + asked, _refusal(root, model="m"))
    assert re.search("answered /models with a page of HTML; " + asked, _refusal(f"{root}/v1"))
    assert "TLS fails" in _refusal(f"https://127.0.0.1:{pages}/v1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            with listener.accept()[0] as channel:
                channel.recv(1000)
                channel.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        threading.Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert re.search("not HTTP; " + asked, _refusal(url))


@pytest.mark.parametrize("reload", [None, (sys.executable, "-c", "pass", "{folder}")])
def test_an_unknown_host_is_said_at_once_even_with_a_reload(reload, monkeypatch):
    def unknown(*_, **__):  # a name server may be slow to say so
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said = _refusal("http://no-such-host.invalid:8000/v1", reload=reload)
    assert "no host is known as no-such-host.invalid" in said and said.endswith("fix url=")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    said = _refusal("http://127.0.0.1:1/v1", folder=str(tmp_path / "file" / "below"))
    assert "no checkpoint can be written" in said and "folder=" in said


def test_long_waits_are_said_once(capfd, monkeypatch, policy):
    monkeypatch.setattr(_session, "_QUIET", 0.3)
    url = f"http://127.0.0.1:{llama_server.free_port()}/v1"
    nothing = (sys.executable, "-c", "pass", "{folder}")
    with OpenAI(url, reload=nothing, start_timeout=1.5) as engine:
        with pytest.raises(EngineError, match="has not answered for 1.5 s"):
            engine.start(policy)
    assert capfd.readouterr().err == f"waiting for {url} to answer\n"


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
        assert session is not None and session.place.is_dir()
        time.sleep(0.3)
        began = time.monotonic()
        engine.close()
        with pytest.raises(EngineError, match="closed before"):
            asked.result()
        assert time.monotonic() - began < 2
        assert not session.place.exists()
    engine.url = server.url
    with engine:
        assert len(_texts(_ask(engine, policy))) == 16


class Hook:
    """An address for `reload`: keeps the headers that it gets, answers after `delay` seconds."""

    def __init__(self, delay: float = 0.0):
        self.headers: list[dict[str, str]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                hook.headers.append(dict(self.headers))
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(delay)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Hook":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_close_does_not_wait_for_a_reload(policy):
    with Hook(delay=20.0) as hook:
        engine = OpenAI("http://127.0.0.1:1/v1", reload=f"http://127.0.0.1:{hook.port}/x", checks=0)
        asked = engine.submit(policy, PROMPTS, SAMPLING, key=jax.random.key(1))
        deadline = time.monotonic() + 10
        while not hook.headers and time.monotonic() < deadline:
            time.sleep(0.02)
        assert hook.headers
        session, began = engine._session, time.monotonic()
        engine.close()
        with pytest.raises(EngineError, match="closed before"):
            asked.result()
        assert time.monotonic() - began < 1
        assert session is not None
        session._thread.join(1.0)
        assert not session._thread.is_alive() and not session.place.exists()


def test_nothing_is_reloaded_after_close(policy, tmp_path):
    code = "import sys, time; open(sys.argv[2], 'a').write('x'); time.sleep(30)"
    command = (sys.executable, "-c", code, "{folder}", str(tmp_path / "ran"))
    engine = OpenAI("http://127.0.0.1:1/v1", reload=command, checks=0)
    asked = [
        engine.submit(_moved(policy, i), PROMPTS, SAMPLING, key=jax.random.key(1)) for i in range(3)
    ]
    deadline = time.monotonic() + 10
    while not (tmp_path / "ran").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    engine.close()
    for one in asked:
        with pytest.raises(EngineError, match="closed"):
            one.result()
    time.sleep(0.3)
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize(("host", "sent"), [("127.0.0.1", True), ("localhost", False)])
def test_the_key_goes_to_no_other_host(policy, monkeypatch, host, sent):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url = f"http://127.0.0.1:{llama_server.free_port()}/v1"
    with Hook() as hook:
        there = f"http://{host}:{hook.port}/x"
        with OpenAI(url, reload=there, start_timeout=0.5) as engine:
            assert "secret" not in repr(engine)
            with pytest.raises(EngineError, match="has not answered"):
                engine.start(policy)
            assert "secret" not in repr(engine._session)
    assert [headers.get("Authorization") for headers in hook.headers] == [
        "Bearer secret" if sent else None
    ]


def test_the_key_goes_from_https_to_https_only():
    for url, there, sent in (
        ("https://a/v1", "https://a/x", True),
        ("https://a/v1", "http://a/x", False),
        ("http://a/v1", "https://a:9/x", True),
        ("https://a/v1", "https://a.b/x", False),
    ):
        client = Client(url, timeout=1.0, retries=0, key="secret", closed=threading.Event())
        client = client.at(there, timeout=1.0)
        assert ("Authorization" in client._headers) is sent


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


def _moved(policy: Transformer, times: int, size: float = 0.0) -> Transformer:
    """Other arrays: each `times` small steps away."""
    return jax.tree.map(lambda x: x + size * times * x.std(), policy)


def _until(times: int, counter: pathlib.Path, command: tuple[str, ...]) -> tuple[str, ...]:
    """A reload that does nothing after so many times."""
    code = (
        "import pathlib, subprocess, sys\n"
        "file = pathlib.Path(sys.argv[1]); done = len(file.read_text()) if file.exists() else 0\n"
        "file.write_text('x' * (done + 1))\n"
        "if done < int(sys.argv[2]): sys.exit(subprocess.run(sys.argv[3:]).returncode)\n"
    )
    return (sys.executable, "-c", code, str(counter), str(times), *command)


@needs_server
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3], ids=lambda size: f"steps of {size:g}")
def test_a_reload_that_does_nothing_later_on_is_caught(policy, tmp_path, size):
    """Steps of 1e-3 change log-probs by less than the tolerance, and by more than 1e-3 nats."""
    said = "other weights than the policy" if size == 1.0 else "still has old weights.*reload="
    policies = [tiny_model(jax.random.key(i)) for i in range(5)]
    if size != 1.0:
        policies = [_moved(policy, i, size) for i in range(5)]
    with LlamaServer(tmp_path / "policy.gguf") as server:
        reload = _until(3, tmp_path / "count", server.reload(1))
        with OpenAI(server.url, reload=reload, cut_at_stop=True) as engine:
            asked = [
                engine.submit(x, PROMPTS, Sampling(2, 8, (1,)), key=jax.random.key(1))
                for x in policies
            ]
            for good in asked[:3]:
                good.result()
            for stale in asked[3:]:
                with pytest.raises(EngineError, match=said):
                    stale.result()


@needs_server
def test_the_checkpoints_of_failed_reloads_are_deleted(server, policy, tmp_path):
    code = (
        "import os, sys\n"
        "if os.path.exists(sys.argv[2]): os.remove(sys.argv[2]); sys.exit('not now')"
    )
    command = (sys.executable, "-c", code, "{folder}", str(tmp_path / "once"))
    first, second, third = _copies(policy, 3)
    with OpenAI(server.url, reload=command, checks=0) as engine:
        _ask(engine, first)
        (tmp_path / "once").write_text("")
        with pytest.raises(EngineError, match="status 1: not now"):
            _ask(engine, second)
        session = engine._session
        assert session is not None
        names = lambda: sorted(x.name for x in session.place.iterdir())  # noqa: E731
        assert names() == ["weights-0", "weights-1"]
        _ask(engine, third)
        assert names() == ["weights-2"]
    assert not session.place.exists()


@needs_server
def test_honest_reloads_pass_however_small_the_update(policy, tmp_path):
    sizes = [0, 1e-1, 0, 1e-2, 1e-3, 1e-5, 1e-7, 0]
    with LlamaServer(tmp_path / "policy.gguf") as server:
        with OpenAI(server.url, reload=server.reload(1), checks=0, tolerance=1e-3) as engine:
            asked = [
                engine.submit(_moved(policy, 1, x), PROMPTS, SAMPLING, key=jax.random.key(1))
                for x in sizes
            ]
            assert [len(_texts(x.result())) for x in asked] == [16] * len(sizes)


def _copies(policy: Transformer, count: int) -> list[Transformer]:
    return [jax.tree.map(lambda x: x + 0, policy) for _ in range(count)]


@needs_server
def test_later_policies_are_not_waited_for(server, policy):
    nothing = (sys.executable, "-c", "pass", "{folder}")
    first, second, third = _copies(policy, 3)
    with FaultProxy(server.port, [None] * 32 + ["slow"] * 16, delay=1.0) as proxy:
        with OpenAI(proxy.url, reload=nothing, concurrency=16) as engine:
            for waited in (first, second):
                assert engine.submit(
                    waited, PROMPTS, SAMPLING, key=jax.random.key(1)
                ).job.future.done()
            asked = engine.submit(third, PROMPTS, SAMPLING, key=jax.random.key(1))
            assert not asked.job.future.done()
            # Greedy is new, so it is compared, whichever policy this is.
            greedy = engine.submit(third, PROMPTS, Sampling(1, 4, (1,), 0), key=jax.random.key(1))
            assert greedy.job.future.done()
            asked.result()


@pytest.mark.parametrize("noise", [1e-5, 1e-2])
def test_fingerprints_of_noisy_servers(noise):
    """As a server of other rounding answers; `noise` is the same for the same weights."""
    rng = np.random.default_rng(0)
    rounded = lambda own: own + rng.normal(0, noise, own.shape)  # noqa: E731
    answer = lambda said: (said.argmax(axis=1), said.max(axis=1))  # noqa: E731
    for size in (1e-4, 5e-3, 0.3):
        prints, own = Fingerprints(0.05, "it"), rng.normal(-3, 1, (8, 100))
        for _ in range(200):
            own = own + rng.normal(0, size, own.shape)
            said = rounded(own)
            prints.check(own, *answer(said))
        steps = 0
        with pytest.raises(EngineError, match="check reload="):
            while steps < 10_000:
                steps += 1
                own = own + rng.normal(0, size, own.shape)
                prints.check(own, *answer(said))
        # Small updates add up to what counts.
        assert steps == 1 if size >= 5e-3 else steps > 5


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
        ({"url": None}, r"url= is missing; give .*openai\(url='http://127.0.0.1:8000/v1'\)"),
        ({"url": "127.0.0.1:8000"}, "must be an http"),
        ({"url": "http://x:port/v1"}, "url='http://x:port/v1' must be"),
        ({"reload": "http://x:port/v1"}, "reload='http://x:port/v1' must be"),
        ({"checks": -1}, "checks=-1 must be .*None: all"),
        ({"start_timeout": float("inf")}, "start_timeout=inf"),
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
    if "url" not in options:
        with pytest.raises(ValueError, match="url= is missing"):
            OpenAI(**options)


def test_options_of_other_types_are_refused_by_name():
    """As the command line gives them, where no types are checked."""
    wrong = (
        {"url": 8000}, {"reload": 5}, {"reload": ("x", 5, "{folder}")}, {"concurrency": "8"},
        {"concurrency": True}, {"checks": 1.5}, {"timeout": "3"}, {"model": 5}, {"folder": 5},
        {"cut_at_stop": 1},
    )  # fmt: skip
    code = (
        "from eqrl.samplers import OpenAI\n"
        f"for options in {wrong!r}:\n"
        "    try: OpenAI(**{'url': 'http://127.0.0.1:8000/v1', **options})\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == len(wrong), done
    for options, line in zip(wrong, said, strict=True):
        ((name, value),) = options.items()
        assert line.startswith(f"{name}={value!r} must be ")


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
