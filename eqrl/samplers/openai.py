"""Any server of OpenAI's completions API that speaks token ids: llama.cpp, vLLM, SGLang."""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import queue
import shutil
import tempfile
import threading
import time
import urllib.parse
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer, save
from ._completions import body, read, sampled
from ._http import Client, Unanswered
from ._reload import check_reload, run_reload
from ._requests import Completion, seeds, to_rollout
from ._verify import verify
from .base import Sampling
from .engine import Engine, EngineError, Held


@dataclasses.dataclass(eq=False)
class OpenAI(Engine):
    """A completions server at an address.

    Each completion is a request of its own, with token ids and a seed of its own; one that fails is
    sent again, alone, with the same seed. What the server says is compared with the policy itself
    before anything trains on it; the rollout this is done on is waited for in `submit`, where the
    policy still has its weights.

    The server takes no weights over this API. `reload` is how it gets them: after every update the
    policy is written as a Hugging Face checkpoint (no tokenizer), and then a command is run, or a
    request sent. When that returns, the server must not answer with the old weights any more; it
    need not answer yet. Without `reload`, the server must hold the first policy, and that one only.

    Attributes:
        url: of the API, as in `http://127.0.0.1:8000/v1`.
        model: as the server calls it; by default the first that it lists.
        reload: a command as a tuple of strings, in which "{folder}" is the folder of the
            checkpoint; no shell reads it. Or an http(s) address that gets `POST {"model_path":
            folder}`, as SGLang's `/update_weights_from_disk` does.
        folder: where checkpoints are written, each in a folder of its own that is deleted when
            the next is in use; must be seen by the server. By default the temporary folder.
        concurrency: requests under way at once.
        timeout: seconds in which a completion must be there.
        start_timeout: seconds that a reload may take, and then the server to answer again.
        retries: how often a request that failed is sent again, ever later.
        tolerance: mean absolute difference of log-probs in nats, above which the server is taken
            for broken. Quantised weights need more than the default.
        checks: of how many policies, from the first, rollouts are compared with the policy: the
            first one at each temperature. `None` is all; each costs the overlap of one rollout.
        cut_at_stop: drop what follows a stop token that the server does not stop at. The samples
            are the same, and what was dropped was sampled for nothing.
        key_variable: environment variable that holds the API key, if there is one.

    Raises:
        ValueError: if an option cannot be right.
    """

    url: str
    model: str | None = dataclasses.field(default=None, kw_only=True)
    reload: str | Sequence[str] | None = dataclasses.field(default=None, kw_only=True)
    folder: str | None = dataclasses.field(default=None, kw_only=True)
    concurrency: int = dataclasses.field(default=8, kw_only=True)
    timeout: float = dataclasses.field(default=300.0, kw_only=True)
    start_timeout: float = dataclasses.field(default=600.0, kw_only=True)
    retries: int = dataclasses.field(default=4, kw_only=True)
    tolerance: float = dataclasses.field(default=0.05, kw_only=True)
    checks: int | None = dataclasses.field(default=2, kw_only=True)
    cut_at_stop: bool = dataclasses.field(default=False, kw_only=True)
    key_variable: str = dataclasses.field(default="OPENAI_API_KEY", kw_only=True)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"url={self.url!r} must be an http(s) address such as http://127.0.0.1:8000/v1"
            )
        check_reload(self.reload)
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("timeout", "start_timeout", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        self._session: _Session | None = None
        self._held = Held()
        self._weights: _Weights | None = None
        self._given = 0

    def start(self, policy: Transformer) -> None:
        """See `Engine`.

        Raises:
            EngineError: if the server does not answer, or without token ids or log-probs.
        """
        job = _Job(self._give(policy), [], None, 0)
        self._running().ask(job)
        job.future.result()

    def submit(
        self,
        policy: Transformer,
        prompts: Prompts,
        sampling: Sampling,
        *,
        key: PRNGKeyArray,
        version: int = 0,
    ) -> "_Asked":
        """See `Engine`."""
        weights = self._give(policy)
        rows = zip(np.asarray(prompts.tokens), np.asarray(prompts.positions), strict=True)
        of_prompt = [tokens[positions >= 0].tolist() for tokens, positions in rows]
        of_row = [ids for ids in of_prompt for _ in range(sampling.samples)]
        numbers = seeds(prompts, sampling, key).tolist()
        job = _Job(weights, list(zip(of_row, numbers, strict=True)), sampling, version)
        asked = _Asked(job, prompts)
        self._running().ask(job)
        temperature = float(sampling.temperature)
        checks = math.inf if self.checks is None else self.checks
        if weights.number < checks and temperature not in weights.checked:
            verify(policy, asked.result(), sampling, tolerance=self.tolerance, who=self._who)
            weights.checked.add(temperature)
        return asked

    def close(self) -> None:
        """See `Engine`. The server is left as it is."""
        if self._session is not None:
            self._session.close()
        self._session = self._weights = None
        self._held.drop()
        self._given = 0

    @property
    def _who(self) -> str:
        return f"the server at {self.url.rstrip('/')}"

    def _running(self) -> "_Session":
        if self._session is None:
            self._session = _Session(self)
        return self._session

    def _give(self, policy: Transformer) -> "_Weights":
        """The policy's weights, written where the server can get them if it has others."""
        if self._weights is not None and self._held.are(policy):
            return self._weights
        folder = None
        if self.reload is not None:
            folder = self._running().folder / f"weights-{self._given}"
            save(policy, folder)
        elif self._weights is not None:
            raise EngineError(
                f"{self._who} was given another policy than the one it holds; give reload=, a "
                "command or an address that takes new weights to it"
            )
        self._weights = _Weights(self._given, folder)
        self._held.take(policy)
        self._given += 1
        return self._weights


@dataclasses.dataclass(eq=False)
class _Weights:
    """Of one policy.

    Attributes:
        number: how many policies came before.
        folder: a checkpoint, or `None` if the server has them from its start.
        checked: temperatures at which a rollout agreed with the policy.
    """

    number: int
    folder: pathlib.Path | None
    checked: set[float] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class _Job:
    """A rollout to sample; without `sampling`, only weights to serve.

    Attributes:
        weights: that sample it.
        rows: prompt and seed of each completion.
        sampling: what to sample.
        version: of the policy.
        future: of the completions.
    """

    weights: _Weights
    rows: list[tuple[list[int], int]]
    sampling: Sampling | None
    version: int
    future: "concurrent.futures.Future[list[Completion]]" = dataclasses.field(
        default_factory=concurrent.futures.Future
    )


@dataclasses.dataclass(eq=False)
class _Asked:
    """A rollout that was asked for."""

    job: _Job
    prompts: Prompts
    rollout: Rollout | None = None

    def result(self) -> Rollout:
        if self.rollout is None:
            assert self.job.sampling is not None
            self.rollout = to_rollout(self.prompts, self.job.sampling, self.job.future.result())
        return self.rollout


class _Session:
    """From the first use to `close`: one thread that does one job after the other."""

    def __init__(self, engine: OpenAI):
        self.engine = engine
        self._closed = threading.Event()
        self._client = Client(
            engine.url.rstrip("/"),
            timeout=engine.timeout,
            retries=engine.retries,
            key=os.environ.get(engine.key_variable, ""),
            closed=self._closed,
        )
        if engine.folder is not None:
            pathlib.Path(engine.folder).mkdir(parents=True, exist_ok=True)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="eqrl-weights-", dir=engine.folder))
        self.folder.chmod(0o755)  # the server may be another user's
        # Also at exit, when nobody closed it.
        self._delete = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._serving: _Weights | None = None
        self._model = ""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, job: _Job) -> None:
        """Does it after all that was asked before."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends what is under way; what waits for it gets an error."""
        self._closed.set()
        self._client.close()
        self._jobs.put(None)
        self._thread.join()
        self._delete()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._serve(job.weights)
                job.future.set_result(self._complete(job))
            except BaseException as error:  # whatever it is, it belongs to who waits
                job.future.set_exception(error)

    def _serve(self, weights: _Weights) -> None:
        """Has the server hold these weights."""
        if weights is self._serving:
            return
        engine, end = self.engine, time.monotonic() + self.engine.start_timeout
        if weights.folder is not None:
            assert engine.reload is not None
            # Whatever goes wrong from here on, the old weights cannot be relied on.
            old, self._serving = self._serving, None
            folder = str(weights.folder.resolve())
            run_reload(engine.reload, folder, self._client, timeout=engine.start_timeout)
            if old is not None and old.folder is not None:
                shutil.rmtree(old.folder, ignore_errors=True)
        try:
            self._await(end, patient=weights.folder is not None)
        finally:
            self._client.hang_up()
        self._serving = weights

    def _await(self, end: float, *, patient: bool) -> None:
        """Until one token comes; patience is for a server that may be starting."""
        who = self.engine._who
        while True:
            try:
                self._model = self.engine.model or self._listed()
                answer = self._client.once(
                    "/completions", body(self._model, [0], 0, Sampling(1, 1, ()))
                )
                sampled(answer, who)
                return
            except Unanswered as error:
                if error.refused and not patient:
                    raise EngineError(
                        f"nothing answers at {self._client.url}; start the server or fix url="
                    ) from None
                if time.monotonic() > end:
                    raise EngineError(
                        f"{who} has not answered for {self.engine.start_timeout:g} s, at last: "
                        f"{error}; see its log, or raise start_timeout="
                    ) from None
            self._closed.wait(0.1)

    def _listed(self) -> str:
        """The model that the server names first."""
        listed: Any = self._client.once("/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.engine._who} lists no models; give model=") from None

    def _complete(self, job: _Job) -> list[Completion]:
        """All completions of a job, as many at once as may be."""
        found: list[Completion | None] = [None] * len(job.rows)
        todo = queue.SimpleQueue[int]()
        for i in range(len(job.rows)):
            todo.put(i)
        failed: list[BaseException] = []

        def work() -> None:
            try:
                while not failed:
                    i = todo.get_nowait()
                    found[i] = self._completion(job, *job.rows[i])
            except queue.Empty:
                pass
            except BaseException as error:  # raised below
                failed.append(error)
            finally:
                self._client.hang_up()

        count = min(self.engine.concurrency, len(job.rows))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return [completion for completion in found if completion is not None]

    def _completion(self, job: _Job, prompt: list[int], seed: int) -> Completion:
        assert job.sampling is not None
        engine = self.engine
        answer = self._client.ask("/completions", body(self._model, prompt, seed, job.sampling))
        return read(
            answer, job.sampling, job.version, cut_at_stop=engine.cut_at_stop, who=engine._who
        )
