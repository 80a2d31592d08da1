"""One request a completion, and the answers of three kinds of server, as JSON.

The same fields go to every server, because each ignores those that it does not know (checked with
llama.cpp, read in the sources of vLLM and SGLang), and `top_k=-1` means no top-k to all of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ._requests import Completion
from .base import Sampling
from .engine import EngineError


# The smallest positive float32; llama.cpp answers probabilities, which may be rounded to 0.
_LEAST = 1.4e-45

# Nothing between the policy's distribution and the sample.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    # The following are llama.cpp's.
    "repeat_penalty": 1.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    # Log-probs differ by rounding where a prompt was computed with other neighbours.
    "cache_prompt": False,
}


def body(model: str, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    """The request for one completion.

    Args:
        model: as the server calls it.
        prompt: token ids.
        seed: of this completion.
        sampling: what to sample.
    """
    temperature = float(sampling.temperature)
    return _NEUTRAL | {
        "model": model,
        "prompt": list(prompt),
        "n": 1,
        "max_tokens": sampling.max_tokens,
        "temperature": temperature,
        "seed": seed,
        "logprobs": 1,
        # vLLM and SGLang
        "stop_token_ids": list(sampling.stop_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "no_stop_trim": True,
        # llama.cpp: its log-probs are those at temperature 1, its probabilities the sampler's.
        "post_sampling_probs": temperature not in (0.0, 1.0),
    }


def read(
    answer: Any, sampling: Sampling, version: int, *, cut_at_stop: bool, who: str
) -> Completion:
    """The completion in an answer.

    Args:
        answer: JSON.
        sampling: what was asked for.
        version: of the policy.
        cut_at_stop: drop what comes after a stop token that the server did not stop at.
        who: names the server in messages.

    Raises:
        EngineError: if it is not what was asked for.
    """
    ids, logprobs, finish = sampled(answer, who)
    end = next((i for i, token in enumerate(ids) if token in sampling.stop_ids), None)
    if end is not None and end + 1 < len(ids):
        if not cut_at_stop:
            raise EngineError(
                f"{who} does not stop at token {ids[end]} of stop_ids={sampling.stop_ids}; make it "
                "an end-of-sequence token there, or give cut_at_stop=True, which drops what "
                "follows it"
            )
        ids, logprobs = ids[: end + 1], logprobs[: end + 1]
    elif end is None and finish == "stop":
        raise EngineError(
            f"{who} stops at token {ids[-1]}, which is not in stop_ids={sampling.stop_ids}; "
            "add it, or have the server not stop there"
        )
    elif end is None and len(ids) < sampling.max_tokens:
        raise EngineError(
            f"{who} ended a completion after {len(ids)} of {sampling.max_tokens} tokens "
            f"({finish!r}), likely at the end of its context; start it with a longer one"
        )
    return Completion(ids, logprobs, end is not None, version)


def sampled(answer: Any, who: str) -> tuple[list[int], list[float], str]:
    """Token ids, their log-probs and why it ended; from llama.cpp, vLLM or SGLang.

    Raises:
        EngineError: if ids or log-probs are missing or do not fit together.
    """
    try:
        (choice,) = answer["choices"]
        said = choice["logprobs"] or {}
        if "content" in said:
            ids, logprobs = _of_entries(choice, said["content"])
        else:
            ids, logprobs = _of_columns(choice, said)
    except (KeyError, TypeError, ValueError):
        raise EngineError(
            f"{who} answers a completion in a layout that is not known: {str(answer)[:200]}"
        ) from None
    if not logprobs:
        raise EngineError(f"{who} answers no log-probs; allow them there")
    if ids is None:
        raise EngineError(
            f"{who} offers no token ids, and text is never tokenised again; use a server that "
            "does: llama.cpp, vLLM, or SGLang with return_token_ids"
        )
    counted = (answer.get("usage") or {}).get("completion_tokens", len(logprobs))
    if not len(ids) == len(logprobs) == counted:
        raise EngineError(
            f"{who} answers {len(ids)} ids and {len(logprobs)} log-probs of {counted} tokens; "
            "llama.cpp leaves out tokens that end amid a character, so serve ids with a made-up "
            "vocabulary there (docs/backends.md)"
        )
    if not all(math.isfinite(x) for x in logprobs):
        raise EngineError(f"{who} answers log-probs that are not finite; see its log")
    return ids, logprobs, str(choice.get("finish_reason"))


def _of_entries(choice: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]):
    """A record a token, as llama.cpp answers."""
    ids = choice.get("token_ids")
    if ids is None and all("id" in entry for entry in entries):
        ids = [int(entry["id"]) for entry in entries]
    logprobs = [
        math.log(max(entry["prob"], _LEAST)) if "prob" in entry else float(entry["logprob"])
        for entry in entries
    ]
    return ids, logprobs


def _of_columns(choice: Mapping[str, Any], said: Mapping[str, Any]):
    """A list of tokens and one of log-probs, as vLLM and SGLang answer."""
    ids, tokens = choice.get("token_ids"), said.get("tokens") or []
    if ids is None and tokens and all(str(token).startswith("token_id:") for token in tokens):
        ids = [int(token.removeprefix("token_id:")) for token in tokens]
    return ids, [float(x) for x in said.get("token_logprobs") or []]
