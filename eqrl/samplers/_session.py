"""What runs behind `OpenAI` from its first use to its end: one thread, one job after the other."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import queue
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from ..models import Transformer, save
from ._completions import body, read, sampled
from ._fingerprint import Fingerprints
from ._http import Client, Refused, Unanswered
from ._reload import run_reload
from ._requests import Completion
from .base import Sampling
from .engine import EngineError


# Seconds of silence after which it says what it waits for.
_QUIET = 5.0
# Seconds that `close` gives what is under way to end by itself.
_GRACE = 0.5


@dataclasses.dataclass(eq=False)
class Weights:
    """Of one policy.

    Attributes:
        folder: a checkpoint, or `None` if the server has them from its start.
        checked: temperatures at which a rollout agreed with the policy.
        texts: token ids that the server is asked to continue by one once it has the weights.
        own: the policy's log-probs of what may follow them; `None` if nothing is to be compared.
    """

    folder: pathlib.Path | None
    checked: set[float] = dataclasses.field(default_factory=set)
    texts: list[list[int]] = dataclasses.field(default_factory=list)
    own: Float[Array, "probe vocab"] | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A rollout to sample; without `sampling`, only weights to serve.

    Attributes:
        weights: that sample it.
        rows: prompt and seed of each completion.
        sampling: what to sample.
        version: of the policy.
        future: of the completions.
    """

    weights: Weights
    rows: list[tuple[list[int], int]]
    sampling: Sampling | None
    version: int
    future: "concurrent.futures.Future[list[Completion]]" = dataclasses.field(
        default_factory=concurrent.futures.Future
    )

    def fail(self, error: BaseException) -> None:
        """Raises it where the job is waited for, if it has not ended otherwise."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)


@dataclasses.dataclass(eq=False, kw_only=True)
class Session:
    """From the first use to `close`. The attributes are those of `OpenAI`, and:

    Attributes:
        who: names the server in messages.
        key: of the API, or empty.

    Raises:
        EngineError: if no checkpoint can be written to the folder.
    """

    url: str
    who: str
    model: str | None
    reload: str | Sequence[str] | None
    folder: str | None
    concurrency: int
    timeout: float
    start_timeout: float
    retries: int
    tolerance: float
    cut_at_stop: bool
    key: str = dataclasses.field(repr=False)
    key_variable: str

    def __post_init__(self) -> None:
        self._closed = threading.Event()
        self._client = Client(
            self.url,
            timeout=self.timeout,
            retries=self.retries,
            key=self.key,
            closed=self._closed,
        )
        try:
            if self.folder is not None:
                pathlib.Path(self.folder).mkdir(parents=True, exist_ok=True)
            self.place = pathlib.Path(tempfile.mkdtemp(prefix="eqrl-weights-", dir=self.folder))
        except OSError as error:
            raise self._unwritable(error) from None
        self.place.chmod(0o755)  # the server may be another user's
        # Also at exit, when nobody closed it.
        self._delete = weakref.finalize(self, shutil.rmtree, self.place, ignore_errors=True)
        self._fingerprints = Fingerprints(self.tolerance, self.who)
        self._serving: Weights | None = None
        self._fingerprinted: Weights | None = None
        self._model = self.model or ""
        self._answered = False
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, policy: Transformer, number: int) -> pathlib.Path:
        """Writes a policy as a checkpoint of its own; returns its folder.

        Raises:
            EngineError: if it cannot.
        """
        folder = self.place / f"weights-{number}"
        try:
            save(policy, folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._unwritable(error) from None
        return folder

    def ask(self, job: Job) -> None:
        """Does it after all that was asked before."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends what is under way; what waits for it gets an error."""
        self._closed.set()
        self._client.close()
        self._jobs.put(None)
        self._thread.join(_GRACE)
        # What the thread may still hang in, such as the look-up of a name, ends by itself.
        current = self._current
        if self._thread.is_alive() and current is not None:
            current.fail(self._was_closed())
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.fail(self._was_closed())
        self._jobs.put(None)
        self._delete()

    def _was_closed(self) -> EngineError:
        return EngineError(f"the engine at {self.url} was closed before it had answered")

    def _unwritable(self, error: OSError) -> EngineError:
        where = self.folder or tempfile.gettempdir()
        return EngineError(
            f"no checkpoint can be written to {where} ({error.strerror or error}); give a "
            "folder= that can be written to and has room"
        )

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._current = job
            try:
                if self._closed.is_set():
                    raise self._was_closed()
                self._serve(job.weights)
                found = self._complete(job)
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    job.future.set_result(found)
            except BaseException as error:  # whatever it is, it belongs to who waits
                job.fail(error)
            self._current = None

    def _serve(self, weights: Weights) -> None:
        """Has the server hold these weights, and say so."""
        end = time.monotonic() + self.start_timeout
        try:
            if weights is not self._serving:
                if weights.folder is not None:
                    assert self.reload is not None
                    # Whatever goes wrong from here on, the old weights cannot be relied on.
                    self._serving = None
                    folder = str(weights.folder.resolve())
                    run_reload(self.reload, folder, self._client, timeout=self.start_timeout)
                with self._patience():
                    self._await(end, patient=weights.folder is not None)
                self._answered = True
            if weights.own is not None and weights is not self._fingerprinted:
                self._serving = None  # not if this finds others
                self._fingerprints.check(np.asarray(weights.own), *self._said(weights.texts))
                self._fingerprinted = weights
                weights.own = None
        finally:
            self._client.hang_up()
        self._serving = weights
        self._forget_before(weights)

    def _forget_before(self, weights: Weights) -> None:
        """Deletes the checkpoints that were written before this one, of failed reloads too."""
        if weights.folder is None:
            return
        number = lambda folder: int(folder.name.rpartition("-")[2])  # noqa: E731
        for folder in self.place.iterdir():
            if number(folder) < number(weights.folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _said(self, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest token after each text and its log-prob, NaN where it answers none.

        One after the other, so that the server computes each in the same company each time.
        """
        tokens, logprobs = np.zeros(len(texts), int), np.full(len(texts), np.nan)
        for i, text in enumerate(texts):
            answer = self._client.ask(
                "/completions", body(self._model, text, 0, Sampling(1, 1, (), 0))
            )
            # A beginning of a prompt may end amid a character, which llama.cpp says nothing about.
            with contextlib.suppress(EngineError):
                ids, values, _ = sampled(answer, self.who)
                tokens[i], logprobs[i] = ids[0], values[0]
        return tokens, logprobs

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Says on stderr, once, what is waited for, if that takes long."""
        say = threading.Timer(
            _QUIET, lambda: print(f"waiting for {self.url} to answer", file=sys.stderr, flush=True)
        )
        say.daemon = True
        say.start()
        try:
            yield
        finally:
            say.cancel()

    def _await(self, end: float, *, patient: bool) -> None:
        """Until one token comes; patience is for a server that may be starting."""
        while True:
            try:
                self._model = self.model or self._listed()
                answer = self._client.once(
                    "/completions", body(self._model, [0], 0, Sampling(1, 1, ()))
                )
                sampled(answer, self.who)
                return
            except Refused as error:
                raise self._not_such_a_server(error) from None
            except Unanswered as error:
                self._give_up(error, patient)
                if time.monotonic() > end:
                    raise EngineError(
                        f"{self.who} has not answered for {self.start_timeout:g} s, at last: "
                        f"{error}; see its log, or raise start_timeout="
                    ) from None
            self._closed.wait(0.1)

    def _give_up(self, error: Unanswered, patient: bool) -> None:
        """Raises if no patience helps."""
        if error.fault == "address" and not self._answered:
            raise EngineError(
                f"no server can be reached at {self.url}: {error}; fix url="
            ) from None
        if error.fault == "silent" and not patient:
            raise EngineError(
                f"nothing answers at {self.url}; start the server or fix url= ({error})"
            ) from None
        if error.fault == "strange" and not patient:
            raise EngineError(
                f"{self.who} is no completions server: {error}; is url= the root of the API, "
                "which usually ends in /v1?"
            ) from None

    def _not_such_a_server(self, error: Refused) -> EngineError:
        if error.status in (401, 403):
            return EngineError(f"{error}; its key is read from {self.key_variable}")
        if error.status < 400 or error.status in (404, 405, 501):
            return EngineError(
                f"{self.who} answered HTTP {error.status} to {error.path}; is url= the root of "
                "the API, which usually ends in /v1?"
            )
        return error

    def _listed(self) -> str:
        """The model that the server names first."""
        listed: Any = self._client.once("/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.who} lists no models; give model=") from None

    def _complete(self, job: Job) -> list[Completion]:
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

        count = min(self.concurrency, len(job.rows))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return [completion for completion in found if completion is not None]

    def _completion(self, job: Job, prompt: list[int], seed: int) -> Completion:
        assert job.sampling is not None
        answer = self._client.ask("/completions", body(self._model, prompt, seed, job.sampling))
        return read(answer, job.sampling, job.version, cut_at_stop=self.cut_at_stop, who=self.who)
