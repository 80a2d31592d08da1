"""`--rollout.backend`: from its text to what samples, while a run goes on."""

import ast
import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from build import plugin_builders
from options import Config
from task import Task

from eqrl import models, samplers


# As the command line spells them; options are the constructor's arguments.
_BACKENDS: Mapping[str, Callable[..., samplers.Sampler]] = {
    "naive": samplers.Decoder,
    "own-process": samplers.OwnProcess,
    "openai": samplers.OpenAI,
    "sglang-jax": samplers.SGLangJax,
}


def build_backend(
    text: str, plugins: Mapping[str, Callable[..., Any]], **known: Any
) -> samplers.Sampler:
    """`naive`, `own-process(timeout=60)`, or a class of a plugin; nothing is started.

    Args:
        text: a name, and options in parentheses where the defaults do not do. They are Python
            literals by name; the text is read, never evaluated.
        plugins: further backends by name.
        **known: options that follow from the run, for backends that have them and text that does
            not say them.

    Raises:
        ValueError: if it does not read, or the backend refuses the options.
    """
    name, options = _read(text)
    backends = {**_BACKENDS, **plugins}
    if name not in backends:
        nearest = difflib.get_close_matches(name, list(backends), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"--rollout.backend {name!r} is not known; nearest is {nearest!r}, and there are "
            f"{', '.join(backends)}"
        )
    build = backends[name]
    parameters = inspect.signature(build).parameters
    wrong = [option for option in options if option not in parameters]
    if wrong:
        has = f"has {', '.join(parameters)}" if parameters else "has none"
        raise ValueError(f"--rollout.backend {name}: no option {wrong[0]!r}; it {has}")
    follow = {option: value for option, value in known.items() if option in parameters}
    try:
        return build(**(follow | options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--rollout.backend {name}: {error}") from None


def _read(text: str) -> tuple[str, dict[str, Any]]:
    found = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(\(.*\))?\s*", text, re.DOTALL)
    try:
        if found is None:
            raise SyntaxError
        call = ast.parse(f"f{found[2] or '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise SyntaxError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"--rollout.backend {text!r} does not read; write a name, or a name with options as "
            'in "own-process(timeout=60)"'
        ) from None
    return found[1], options


def check_backend(config: Config, task: Task) -> None:
    """Refuses what would fail only after the model is loaded, or after the first update.

    Raises:
        ValueError: with the remedy.
    """
    text = config.rollout.backend
    backend = build_backend(text, plugin_builders(config.plugins))
    if isinstance(backend, samplers.ProcessEngine):
        try:
            backend.python()
        except ValueError as error:
            raise ValueError(f"--rollout.backend {text}: {error}") from None
    if samplers.engine_of(backend) is not None and jax.process_count() > 1:
        raise ValueError(
            f"--rollout.backend {text}: an engine serves one process, and there are "
            f"{jax.process_count()}; use naive, which samples on the mesh of all of them"
        )
    if isinstance(backend, samplers.OpenAI) and backend.reload is None and config.steps:
        raise ValueError(
            f"--rollout.backend {text}: training changes the policy, and nothing tells the server; "
            "give reload=, or --steps 0 to evaluate only"
        )
    if task.around is not None and config.rollout.overlap:
        raise ValueError(
            f"--rollout.overlap {config.rollout.overlap}: {task.name} is sampled turn by turn, so "
            "nothing would be sampled while training; leave it out"
        )


def sampler_for(config: Config, task: Task, tokenizer: Any, longest: int) -> samplers.Sampler:
    """What `--rollout.backend` names, as the task wants it; nothing is started.

    Args:
        config: resolved.
        task: may put tools around it.
        tokenizer: for the task.
        longest: tokens of the longest prompt.

    Raises:
        ValueError: if the run does not fit into the context that the backend was given.
    """
    around = task.around or (lambda sampler, _: sampler)
    wrapped = around(samplers.Decoder(), tokenizer)
    room = config.rollout.max_tokens or 0
    room = wrapped.room(room) if isinstance(wrapped, samplers.Turns) else room
    context = longest + room + 16  # engines keep some tokens free
    plugins, text = plugin_builders(config.plugins), config.rollout.backend
    sampler = build_backend(text, plugins, context_length=context)
    if getattr(sampler, "context_length", context) < context:
        raise ValueError(
            f"--rollout.backend {text}: the context is too short for this run; give "
            f"context_length={context}, or leave it out"
        )
    return around(sampler, tokenizer)


@contextlib.contextmanager
def running(sampler: samplers.Sampler, policy: models.Transformer, text: str) -> Iterator[None]:
    """Starts the engine, if one samples in the end, and ends it on the way out.

    Args:
        sampler: of the run.
        policy: the first.
        text: of `--rollout.backend`, to say what starts.

    Raises:
        SystemExit: with one sentence, if it does not start.
    """
    engine = samplers.engine_of(sampler)
    if engine is None:
        yield
        return
    with engine:
        try:
            print(f"starting {text}", flush=True)
            engine.start(policy)
            facts = getattr(engine, "facts", {})
            print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        except (ValueError, samplers.EngineError) as error:
            raise SystemExit(f"error: --rollout.backend: {error}") from None
        yield
