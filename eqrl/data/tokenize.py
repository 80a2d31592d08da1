"""Text to prompt tokens and completions back to text, by any Hugging Face tokenizer.

Nothing here imports `transformers`: the tokenizer is whatever object the caller loaded.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int


Messages: TypeAlias = Sequence[Mapping[str, str]]

_LOG = logging.getLogger("eqrl")


def render(
    messages_or_text: str | Messages, tokenizer: Any, *, system: str | None = None
) -> list[int]:
    """The token ids of one prompt.

    With a chat template: the system and user messages, then the opening of the assistant's turn.
    Without one: the texts, a blank line between them, tokenized with the special tokens that the
    tokenizer puts around text on its own (a BOS where the model expects one).

    Args:
        messages_or_text: the user's text, or a list of `{"role": ..., "content": ...}`.
        tokenizer: a Hugging Face tokenizer.
        system: the system message. `None` sends none, though a template may insert its own.

    Returns:
        Token ids, neither padded nor truncated.
    """
    return encode_prompts([messages_or_text], tokenizer, system=system)[0]


def encode_prompts(
    questions: Sequence[str | Messages], tokenizer: Any, *, system: str | None = None
) -> list[list[int]]:
    """`render` of every question, in one call of the tokenizer."""
    if not questions:
        return []
    chats = [_messages(question, system) for question in questions]
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
    else:
        texts = ["\n\n".join(message["content"] for message in chat) for chat in chats]
    # A template writes its special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not templated)["input_ids"]
    return [[int(token) for token in ids] for ids in encoded]


def fit_prompts(prompts: Sequence[Sequence[int]], limit: int, *, drop: bool = False) -> list[int]:
    """Which prompts have at most `limit` tokens; none is ever truncated.

    Args:
        prompts: token ids of each prompt.
        limit: the longest prompt that fits, in tokens.
        drop: whether longer ones are left out, with one warning that counts them.

    Returns:
        Indices of the prompts that fit, in order; `len(prompts) - len(result)` were left out.

    Raises:
        ValueError: if a prompt is too long and `drop` is False, or if none fits or is non-empty.
    """
    kept = [index for index, prompt in enumerate(prompts) if 0 < len(prompt) <= limit]
    left_out = len(prompts) - len(kept)
    if left_out == 0:
        return kept
    longest = max(len(prompt) for prompt in prompts)
    what = f"{left_out} of {len(prompts)} prompts are empty or longer than {limit} tokens"
    if not drop or not kept:
        raise ValueError(
            f"{what} (the longest has {longest}); raise the prompt `limit`"
            + ("" if drop else " or pass `drop=True` to leave them out")
        )
    _LOG.warning("%s (the longest has %d) and were left out", what, longest)
    return kept


def decode_completions(
    tokens: Int[np.ndarray, "batch time"],
    mask: Bool[np.ndarray, "batch time"],
    tokenizer: Any,
    *,
    positions: Int[np.ndarray, "batch time"] | None = None,
) -> list[str]:
    """The text of each row's completion, special tokens such as the stop token left out.

    Args:
        tokens: rows of prompt, completion and padding.
        mask: True where the policy chose the token.
        tokenizer: a Hugging Face tokenizer.
        positions: -1 on padding. With them a text is all that stands from the first chosen token
            to the row's end, replies of tools included; without, it is the chosen tokens alone.

    Returns:
        One text a row, spaces as the tokenizer gives them.
    """
    if positions is None:
        kept = mask
    else:
        kept = np.logical_or.accumulate(mask, axis=1) & (positions >= 0)
    return [
        tokenizer.decode(
            row[chosen].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row, chosen in zip(tokens, kept, strict=True)
    ]


def _messages(question: str | Messages, system: str | None) -> list[dict[str, str]]:
    user = [{"role": "user", "content": question}] if isinstance(question, str) else question
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [dict(message) for message in user]
