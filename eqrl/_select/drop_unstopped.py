"""Completions whose last token is not a stop token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from .._masked import live_rows
from .._types import Rollout, ScalarLike
from .base import Selection, selection


def drop_unstopped(*stop_ids: int) -> Selection:
    """Drops completions whose last masked token is none of `stop_ids`.

    For rollouts whose `truncated` flag says something else than "no stop token": engines that end
    on stop strings, tool limits or their own time-outs. A model may have several stop ids (Qwen2.5
    has two); name all of them.

    Args:
        *stop_ids: token ids that end a completion, at least one.

    Returns:
        A selection that reads `rollout.tokens`.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty, so every completion would be dropped; name at least 1")
    return selection(_drop_unstopped, builder=drop_unstopped, stop_ids=stop_ids)


def _drop_unstopped(rollout: Rollout, *, stop_ids: tuple[ScalarLike, ...]) -> Bool[Array, " batch"]:
    mask, tokens = rollout.mask, rollout.tokens
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    final = jnp.take_along_axis(tokens, last[:, None], axis=1)
    stopped = jnp.any(final == jnp.asarray(stop_ids, tokens.dtype)[None, :], axis=1)
    return live_rows(mask) & stopped
