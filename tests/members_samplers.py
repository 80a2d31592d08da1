"""The backends that the sampler contract is tested on; a new one is one more row."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jax
import llama_server
from helpers import tiny_model

from eqrl.models import Transformer
from eqrl.samplers import Decoder, OpenAI, OwnProcess, Sampler, SGLangJax


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row.

    Attributes:
        name: of `--rollout.backend`.
        open: starts it; may take seconds, and is done once a session.
        model: from a key to a tiny policy that it can run, the same shapes for every key.
        missing: why it cannot run on this machine, or `None`.
        logprob_error: how far its log-probs may be from the policy's own.
        same_numbers: the same key gives the same log-probs to this absolute error.
    """

    name: str
    open: Callable[[], AbstractContextManager[Sampler]]
    model: Callable[[jax.Array], Transformer] = tiny_model
    missing: Callable[[], str | None] = lambda: None
    logprob_error: float = 1e-4
    same_numbers: float = 1e-5


def no_sglang_jax() -> str | None:
    try:
        SGLangJax().python()
    except ValueError as error:
        return str(error)
    return None


def _sglang_jax() -> SGLangJax:
    # As much as the tests ask for: its attention on a CPU costs what the context could hold.
    return SGLangJax(context_length=128, max_running_requests=32)


def _wide(key: jax.Array) -> Transformer:
    """Heads as wide as the engine's attention wants them. Milder than the others: wide heads make
    sharp scores, which every float32 computation rounds its own way."""
    return jax.tree.map(
        lambda x: x / 2 if x.ndim == 3 else x, tiny_model(key, head_dim=128, tied=False)
    )


@contextlib.contextmanager
def _llama_cpp() -> Iterator[OpenAI]:
    """A real server, and a real command that gives it weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "policy.gguf"
        with llama_server.LlamaServer(file) as server:
            # It knows three stop tokens at most, and those when it loads.
            reload = server.reload(1)
            with OpenAI(
                server.url, reload=reload, cut_at_stop=True, checks=None, start_timeout=60.0
            ) as engine:
                yield engine


BACKENDS = (
    Backend("naive", lambda: contextlib.nullcontext(Decoder())),
    Backend("own-process", OwnProcess),
    Backend(
        "openai",
        _llama_cpp,
        missing=llama_server.missing,
        same_numbers=5e-5,  # it computes those under way together, in changing company
    ),
    Backend("sglang-jax", _sglang_jax, model=_wide, missing=no_sglang_jax),
    Backend("sglang-jax, heads widened", _sglang_jax, missing=no_sglang_jax),
)
