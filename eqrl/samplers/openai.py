"""Any server of OpenAI's completions API that speaks token ids: llama.cpp, vLLM, SGLang."""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts
from .._types import Rollout
from ..models import Transformer
from ._fingerprint import own_logprobs, probes
from ._reload import check_address, check_reload
from ._requests import seeds, to_rollout
from ._session import Job, Session, Weights
from ._verify import verify
from .base import Sampling
from .engine import Engine, EngineError, Held


@dataclasses.dataclass(eq=False)
class OpenAI(Engine):
    """A completions server at an address.

    Each completion is a request of its own, with token ids and a seed of its own; one that fails is
    sent again, alone, with the same seed.

    The server takes no weights over this API. `reload` is how it gets them: after every update the
    policy is written as a Hugging Face checkpoint (no tokenizer), and then a command is run, or a
    request sent. When that returns, the server must not answer with the old weights any more; it
    need not answer yet. Without `reload`, the server must hold the first policy, and that one only.

    What the server says is compared with the policy in two ways. A rollout of each of the first
    `checks` policies at each temperature is compared token by token, log-probs and choice, before
    anything trains on it; `submit` waits for that rollout, because the policy still has its weights
    there. And after every reload the server is asked for the likeliest token after up to eight
    beginnings of a prompt of the first batch, which `submit` does not wait for. Log-probs far off
    the policy's own are an error, and so are answers that are to the last digit those of before the
    reload though the policy's own have moved by 1e-3 nats since. A server that keeps its weights
    and also rounds differently from one time to the next is found later, when the policy has moved
    by `tolerance`. What only a rollout shows (a top-k that comes with a reload) is not looked for
    after the first `checks` policies.

    Attributes:
        url: root of the API, as in `http://127.0.0.1:8000/v1`.
        model: as the server calls it; by default the first that it lists.
        reload: a command as a tuple of strings, in which "{folder}" is the folder of the
            checkpoint; no shell reads it. Or an http(s) address that gets `POST {"model_path":
            folder}`, as SGLang's `/update_weights_from_disk` does. The API key goes along only if
            that is the host of `url`.
        folder: where checkpoints are written, each in a folder of its own that is deleted when
            the next is in use; must be seen by the server. By default the temporary folder.
        concurrency: requests under way at once.
        timeout: seconds without a byte from the server, after which a request has failed. An
            answer comes whole, so it is also what a completion may take.
        start_timeout: seconds that a reload may take, and then the server to answer again. Without
            `reload`, seconds that a server may say that it is not ready; one that is not there, or
            is no such server, is an error at once.
        retries: how often a request that failed is sent again, ever later.
        tolerance: mean absolute difference of log-probs in nats, above which the server is taken
            for broken. Quantised weights need more than the default. After a reload, what the
            server was off by at first is added.
        checks: of how many policies at each temperature, from the first, a rollout is compared.
            `None` is all; each costs the overlap of that rollout.
        cut_at_stop: drop what follows a stop token that the server does not stop at. The samples
            are the same, and what was dropped was sampled for nothing.
        key_variable: environment variable that holds the API key, if there is one.

    Raises:
        ValueError: if an option cannot be right.
    """

    url: str | None = None
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
        if self.url is None:
            raise ValueError(
                "url= is missing; give the root of the API, as in "
                "openai(url='http://127.0.0.1:8000/v1')"
            )
        check_address("url", self.url)
        check_reload(self.reload)
        _check_options(self)
        self._session: Session | None = None
        self._held = Held()
        self._weights: Weights | None = None
        self._given = 0
        self._texts: list[list[int]] | None = None
        self._checked = collections.Counter[float]()

    def start(self, policy: Transformer) -> None:
        """See `Engine`.

        Raises:
            EngineError: if the server does not answer, or without token ids or log-probs.
        """
        job = Job(self._give(policy), [], None, 0)
        self._running().ask(job)
        job.future.result()

    def submit(
        self,
        policy: Transformer,
        prompts: Prompts,
        sampling: Sampling,
        *,
        key: PRNGKeyArray,
        version: int | None = None,
    ) -> "_Asked":
        """See `Engine`."""
        weights = self._give(policy)
        if self.reload is not None and not weights.texts:
            self._texts = self._texts or probes(prompts)
            weights.texts, weights.own = self._texts, own_logprobs(policy, self._texts)
        rows = zip(np.asarray(prompts.tokens), np.asarray(prompts.positions), strict=True)
        of_prompt = [tokens[positions >= 0].tolist() for tokens, positions in rows]
        of_row = [ids for ids in of_prompt for _ in range(sampling.samples)]
        numbers = seeds(prompts, sampling, key).tolist()
        job = Job(weights, list(zip(of_row, numbers, strict=True)), sampling, version or 0)
        asked = _Asked(job, prompts)
        self._running().ask(job)
        temperature = float(sampling.temperature)
        checks = math.inf if self.checks is None else self.checks
        if self._checked[temperature] < checks and temperature not in weights.checked:
            verify(policy, asked.result(), sampling, tolerance=self.tolerance, who=self._who)
            weights.checked.add(temperature)
            self._checked[temperature] += 1
        return asked

    def close(self) -> None:
        """See `Engine`. The server is left as it is."""
        if self._session is not None:
            self._session.close()
        self._session = self._weights = None
        self._held.drop()
        self._given, self._texts = 0, None
        self._checked.clear()

    @property
    def _root(self) -> str:
        return str(self.url).rstrip("/")

    @property
    def _who(self) -> str:
        return f"the server at {self._root}"

    def _running(self) -> Session:
        if self._session is None:
            self._session = Session(
                url=self._root,
                who=self._who,
                model=self.model,
                reload=self.reload,
                folder=self.folder,
                concurrency=self.concurrency,
                timeout=self.timeout,
                start_timeout=self.start_timeout,
                retries=self.retries,
                tolerance=self.tolerance,
                cut_at_stop=self.cut_at_stop,
                key=os.environ.get(self.key_variable, ""),
                key_variable=self.key_variable,
            )
        return self._session

    def _give(self, policy: Transformer) -> Weights:
        """The policy's weights, written where the server can get them if it has others."""
        if self._weights is not None and self._held.are(policy):
            return self._weights
        folder = None
        if self.reload is not None:
            folder = self._running().write(policy, self._given)
        elif self._weights is not None:
            raise EngineError(
                f"{self._who} was given another policy than the one it holds; give reload=, a "
                "command or an address that takes new weights to it"
            )
        self._weights = Weights(folder)
        self._held.take(policy)
        self._given += 1
        return self._weights


@dataclasses.dataclass(eq=False)
class _Asked:
    """A rollout that was asked for."""

    job: Job
    prompts: Prompts
    rollout: Rollout | None = None

    def result(self) -> Rollout:
        if self.rollout is None:
            assert self.job.sampling is not None
            self.rollout = to_rollout(self.prompts, self.job.sampling, self.job.future.result())
        return self.rollout


def _check_options(engine: OpenAI) -> None:
    for name, least in (("concurrency", 1), ("retries", 0), ("checks", 0)):
        value = getattr(engine, name)
        if name == "checks" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            also = " (or None: all policies)" if name == "checks" else ""
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{also}")
    for name in ("timeout", "start_timeout", "tolerance"):
        value = getattr(engine, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a finite number above 0")
    for name in ("model", "folder", "key_variable"):
        value = getattr(engine, name)
        if not isinstance(value, str) and not (value is None and name != "key_variable"):
            raise ValueError(f"{name}={value!r} must be in quotes")
    if not isinstance(engine.cut_at_stop, bool):
        raise ValueError(f"cut_at_stop={engine.cut_at_stop!r} must be True or False")
