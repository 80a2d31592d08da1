"""Completions of several stretches: the policy, its environment's reply, the policy again."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from .._prompts import Prompts, bucket, coarse_bucket, pad_prompts
from .._types import Rollout
from ..models import Transformer
from .base import Sampler, Sampling


# From `[prompt, stretch, reply, stretch, ...]`, each a list of token ids and the last one a stretch
# that ended in a call, to the reply's token ids. `None` ends the row.
Respond: TypeAlias = Callable[[list[list[int]]], Sequence[int] | None]

# Key of the later stretches: no prompt's id, which is what samplers fold into the same key.
_LATER = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Turns:
    """A sampler whose completions call an environment: a tool, a game, a user.

    A *stretch* is what the policy says without interruption. It ends at a stop token or at one of
    `call_ids`; after a call, `respond` is asked, its reply is appended with mask False and log-prob
    0, and the policy goes on from all token ids so far. Nothing is ever tokenized again.

    - `sampling.max_tokens` bounds the tokens the policy chooses in a row, over all its stretches.
      Replies do not count, and nobody is asked for a reply after which nothing may be said.
    - A row also ends at a call that gets no reply: `None`, or `turns` replies were given before.
    - A row is truncated unless its last token is a stop token. A stop token may be a call as well
      (a chat in which the environment speaks after each message): `None` then ends the row well.
    - Columns are the prompt's, then `max_tokens + turns * max_reply` for stretches and replies
      without holes: the same number for every batch. Positions run on.

    The first stretch is one call of the inner sampler, in which samples share their prompt; each
    further turn is one call with a prompt a row, of the rows that go on. It reads all their tokens
    anew. A call asks for one number of tokens for all rows; a row with less left is cut there. So a
    backend needs room for `2 * max_tokens + turns * max_reply` tokens beside the prompt.

    What is compiled: one program for the first stretch, at most one more a turn. Over a run a later
    stretch has at most 4 numbers of rows (the batch, a half, ...), 4 numbers of tokens
    (`max_tokens`, a half, ...) and two widths an octave; a run sees a few of these.

    `respond` runs in this process, row after row. It should be a function of its argument: then the
    same key gives the same rollout, and rows do not depend on each other more than the inner
    sampler makes them. What it raises, the sampler raises.

    Attributes:
        sampler: samples the stretches; any backend.
        respond: from `[prompt, stretch, reply, stretch, ...]`, each a list of token ids, to the
            reply's token ids. An empty reply lets the policy go on, `None` ends the row.
        call_ids: the tokens that end a stretch and ask for a reply.
        turns: replies at most in a row.
        max_reply: tokens of a reply at most; a longer one is an error, as only `respond` knows
            what to leave out.

    Raises:
        ValueError: if a number is below 1, no token or one outside the vocabulary is a call, the
            sampler takes turns itself, or prompts lie in several processes.
        RuntimeError: if a reply is too long or holds what is no token.
    """

    sampler: Sampler
    respond: Respond
    call_ids: tuple[int, ...]
    _: dataclasses.KW_ONLY
    turns: int
    max_reply: int

    def __post_init__(self):
        for name in ("turns", "max_reply"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.call_ids:
            raise ValueError("call_ids is empty; name the tokens that end a call")
        if isinstance(self.sampler, Turns):
            raise ValueError("sampler takes turns already; let one `respond` serve all tools")

    def __call__(
        self, policy: Transformer, prompts: Prompts, sampling: Sampling, *, key: PRNGKeyArray
    ) -> Rollout:
        """See `Sampler`."""
        vocab = policy.architecture.vocab_size
        if not all(0 <= token < vocab for token in self.call_ids):
            raise ValueError(f"call_ids={self.call_ids} must be tokens from 0 to {vocab - 1}")
        if not prompts.tokens.is_fully_addressable:
            raise ValueError("prompts lie in several processes; Turns runs in one process only")
        ends = tuple(dict.fromkeys((*sampling.stop_ids, *self.call_ids)))
        stretch = dataclasses.replace(sampling, stop_ids=ends)
        first = self.sampler(policy, prompts, stretch, key=key)
        rows = going = _begin(prompts, sampling)
        _append(going, first)
        for turn in range(self.turns):
            going = [row for row in going if self._answer(row, vocab)]
            if not going:
                break
            asked = _halving(max(row.left for row in going), sampling.max_tokens)
            stretch = dataclasses.replace(stretch, samples=1, max_tokens=asked)
            later = _prompts(going, prompts, len(rows), self._width(prompts, sampling))
            of_turn = jr.fold_in(jr.fold_in(key, np.uint32(_LATER)), turn)
            _append(going, self.sampler(policy, later, stretch, key=of_turn))
        return _rollout(first, rows, prompts, sampling, self._width(prompts, sampling))

    def room(self, max_tokens: int) -> int:
        """Tokens beside the prompt that a backend's context must have.

        Args:
            max_tokens: those that the policy may choose in a row.
        """
        # A call asks the same number for all rows, so one that is nearly full is asked too much.
        return 2 * max_tokens + self.turns * self.max_reply

    def _width(self, prompts: Prompts, sampling: Sampling) -> int:
        return prompts.tokens.shape[1] + sampling.max_tokens + self.turns * self.max_reply

    def _answer(self, row: "_Row", vocab: int) -> bool:
        """Appends the reply to a row that has called; whether the row goes on."""
        said = row.parts[-1]
        if not said or said[-1] not in self.call_ids or row.left == 0:
            return False
        found = self.respond([list(part) for part in row.parts])
        if found is None:
            return False
        reply = [operator.index(token) for token in found]
        if len(reply) > self.max_reply:
            raise RuntimeError(
                f"a reply has {len(reply)} tokens but max_reply is {self.max_reply}; raise it, or "
                "let `respond` shorten its replies"
            )
        if not all(0 <= token < vocab for token in reply):
            raise RuntimeError(
                f"a reply holds {max(reply, key=abs)}, which is no token of the policy; `respond` "
                f"must return ids from 0 to {vocab - 1}"
            )
        row.parts.append(reply)
        return True


def text_tool(tokenizer: Any, tool: Callable[[str], str | None]) -> Respond:
    """A tool that reads and writes text, as `Turns` wants it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tool: from the text of the stretch that ended in the call, special tokens included, to the
            reply's text. `""` lets the policy go on, `None` ends the row.

    Returns:
        A function for `Turns(respond=...)`. A reply becomes tokens on its own, without the special
        tokens that a tokenizer may put around text.
    """

    def respond(parts: list[list[int]]) -> list[int] | None:
        said = tokenizer.decode(
            parts[-1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        reply = tool(said)
        return None if reply is None else tokenizer(reply, add_special_tokens=False)["input_ids"]

    return respond


@dataclasses.dataclass
class _Row:
    """A completion in the making: prompt, stretch, reply, stretch, ...; `left` may be chosen."""

    id: int
    left: int
    parts: list[list[int]]
    logprobs: list[np.ndarray]  # of each stretch


def _begin(prompts: Prompts, sampling: Sampling) -> list[_Row]:
    """The rows before anything is said. An id is the prompt's and the sample's in one number."""
    used = np.asarray(prompts.positions) >= 0
    return [
        _Row(int(id) * sampling.samples + sample, sampling.max_tokens, [tokens[keep].tolist()], [])
        for tokens, keep, id in zip(
            np.asarray(prompts.tokens), used, np.asarray(prompts.ids), strict=True
        )
        for sample in range(sampling.samples)
    ]


def _append(rows: list[_Row], rollout: Rollout) -> None:
    """A further stretch of each row; what the rollout has beyond these rows only pads it."""
    found = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.logprobs))
    for row, tokens, mask, logprobs in zip(rows, *found, strict=False):
        row.parts.append(tokens[mask][: row.left].tolist())
        row.logprobs.append(logprobs[mask][: row.left])
        row.left -= len(row.parts[-1])


def _prompts(rows: list[_Row], like: Prompts, total: int, widest: int) -> Prompts:
    """All tokens so far as prompts, in one of few shapes, placed as the first prompts were."""
    where = like.tokens.sharding
    shape = like.tokens.shape
    shards = shape[0] // where.shard_shape(shape)[0]
    # Short of rows, the first one is sampled again and again, and thrown away.
    padded = rows + rows[:1] * (_halving(len(rows), total, step=shards) - len(rows))
    tokens = [list(itertools.chain.from_iterable(row.parts)) for row in padded]
    width = min(coarse_bucket(max(map(len, tokens)), least=64), widest)
    # Ids are 32 bits wide; larger ones go round.
    ids = np.array([row.id for row in padded]).astype(np.int32)
    prompts = pad_prompts(tokens, ids.tolist(), width=width)
    if not isinstance(where, NamedSharding):
        return prompts
    return jax.tree.map(lambda x, first: jax.device_put(x, first.sharding), prompts, like)


def _halving(size: int, whole: int, *, step: int = 1) -> int:
    """The smallest of whole, half, quarter and eighth that holds `size`, a multiple of `step`."""
    parts = (bucket(-(-whole // 2**power), step) for power in range(4))
    return min(part for part in parts if part >= size)


def _rollout(
    first: Rollout, rows: list[_Row], prompts: Prompts, sampling: Sampling, width: int
) -> Rollout:
    """Prompt columns, then stretches and replies in a row."""
    start = prompts.tokens.shape[1]
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    mask = np.zeros((len(rows), width), bool)
    logprobs = np.zeros((len(rows), width), first.logprobs.dtype)
    tokens[:, :start] = np.repeat(np.asarray(prompts.tokens), sampling.samples, axis=0)
    positions[:, :start] = np.repeat(np.asarray(prompts.positions), sampling.samples, axis=0)
    truncated = [not row.parts[-1] or row.parts[-1][-1] not in sampling.stop_ids for row in rows]
    for i, row in enumerate(rows):
        column, position = start, len(row.parts[0])
        for number, part in enumerate(row.parts[1:]):
            span = slice(column, column + len(part))
            tokens[i, span] = part
            positions[i, span] = position + np.arange(len(part))
            if number % 2 == 0:  # the policy's
                mask[i, span] = True
                logprobs[i, span] = row.logprobs[number // 2]
            column, position = column + len(part), position + len(part)
    return Rollout(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        positions=jnp.asarray(positions),
        logprobs=jnp.asarray(logprobs),
        group=jnp.asarray(np.asarray(first.group)),
        truncated=jnp.asarray(truncated),
        version=None if first.version is None else jnp.asarray(np.asarray(first.version)),
    )
