"""Prompts: token rows and the ids their randomness hangs on."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Prompts(eqx.Module):
    """A batch of prompts, right-padded to one bucket.

    Attributes:
        tokens: prompt tokens; padding holds 0.
        positions: 0, 1, 2, ... on prompt tokens, -1 on padding.
        ids: a stable number a prompt (its index in the data set). Sampling keys are derived from
            it, so a prompt's completions do not depend on the batch it travels in.
    """

    tokens: Int[Array, "prompt time"]
    positions: Int[Array, "prompt time"]
    ids: Int[Array, " prompt"]


def bucket(size: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `size`, and at least `step`."""
    return max(step, -(-size // step) * step)


def coarse_bucket(size: int, least: int = 256) -> int:
    """The smallest of `least`, 1.5 `least`, 2 `least`, 3 `least`, 4 `least`, ... that holds `size`.

    Two buckets an octave: few programs over a run, and a third of a buffer unused at most.
    """
    power = least
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def pad_prompts(
    rows: Sequence[Sequence[int]], ids: Sequence[int], *, step: int = 32, width: int | None = None
) -> Prompts:
    """Packs token lists into one array, padded on the right.

    Args:
        rows: the token ids of each prompt; none may be empty.
        ids: one stable number a prompt.
        step: the width is a multiple of this, so that few programs are compiled.
        width: the exact width, to keep one shape for a whole run.

    Raises:
        ValueError: if a prompt is empty or longer than `width`, or the lengths disagree.
    """
    if len(rows) != len(ids):
        raise ValueError(f"rows has {len(rows)} prompts but ids has {len(ids)}; give one id a row")
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        raise ValueError("rows holds an empty prompt; every prompt needs at least one token")
    width = bucket(max(lengths), step) if width is None else width
    if max(lengths) > width:
        raise ValueError(
            f"a prompt has {max(lengths)} tokens but width is {width}; raise width or drop it"
        )
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        positions[i, : len(row)] = np.arange(len(row))
    return Prompts(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(ids, jnp.int32))
