"""`--rollout.backend`: from its text to what samples."""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from eqrl import samplers


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
