"""Rotary position embeddings and the ways checkpoints stretch them."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._contract import accumulator


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a checkpoint differ from `theta ** (-2i / head_dim)`.

    Attributes:
        kind: `linear` divides every frequency by `factor`; `llama3` only those whose wavelength
            is long against `original_positions`, with a ramp between; `yarn` likewise with a ramp
            over the dimensions, and also scales cosines and sines.
        factor: how many times longer the context became.
        original_positions: context length of the pretraining (`llama3`, `yarn`).
        low: `llama3`: wavelengths above `original_positions / low` are divided whole. `yarn`:
            number of turns below which a dimension is divided whole (`beta_slow`).
        high: `llama3`: wavelengths below `original_positions / high` are kept. `yarn`: number of
            turns above which a dimension is kept (`beta_fast`).
        magnitude: factor on cosines and sines (`yarn`).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low: float = 1.0
    high: float = 4.0
    magnitude: float = 1.0


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, in float32."""

    cos: Float[Array, "batch time half"]
    sin: Float[Array, "batch time half"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each of the `head_dim / 2` planes, computed in float64.

    Args:
        head_dim: width of a head.
        theta: base of the geometric series.
        scaling: see `RopeScaling`.

    Returns:
        Array of shape `[head_dim / 2]`.

    Source: Su et al. 2021 (arXiv:2104.09864); yarn: Peng et al. 2023 (arXiv:2309.00071);
    llama3: the Llama 3.1 release (arXiv:2407.21783).
    """
    base = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match scaling:
        case None:
            return base
        case RopeScaling(kind="linear"):
            return base / scaling.factor
        case RopeScaling(kind="llama3"):
            return _llama3(base, scaling)
        case RopeScaling(kind="yarn"):
            return _yarn(base, theta, scaling)
    raise ValueError(f"unknown rope scaling {scaling!r}; use linear, llama3 or yarn")


def _llama3(base, scaling):
    turns = scaling.original_positions * base / (2 * math.pi)
    keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return keep * base + (1 - keep) * base / scaling.factor


def _yarn(base, theta, scaling):
    def plane(turns):
        # The (fractional) plane that makes this many turns over the original context.
        angle = scaling.original_positions / (turns * 2 * math.pi)
        return base.size * math.log(angle) / math.log(theta)

    first = max(math.floor(plane(scaling.high)), 0)
    last = min(math.ceil(plane(scaling.low)), 2 * base.size - 1)
    ramp = (np.arange(base.size) - first) / max(last - first, 1e-3)
    divide = np.clip(ramp, 0.0, 1.0)
    return (1 - divide) * base + divide * base / scaling.factor


def rotary(
    positions: Int[Array, "batch time"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> Rotary:
    """Cosines and sines for `rotate`; padding (position -1) gets those of position 0."""
    radians = jnp.asarray(frequencies(head_dim, theta, scaling), jnp.float32)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    at = jnp.maximum(positions, 0).astype(jnp.float32)
    angle = at[:, :, None] * radians[None, None, :]
    return Rotary(jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude)


def rotate(x: Float[Array, "batch time heads head_dim"], rotary: Rotary):
    """Turns each plane `(x[i], x[i + head_dim / 2])` by its angle, in float32.

    Args:
        x: queries or keys.
        rotary: from `rotary`.

    Returns:
        The turned array, in the shape and type of `x`.
    """
    wide = x.astype(accumulator(x.dtype))
    cos = rotary.cos[:, :, None, :].astype(wide.dtype)
    sin = rotary.sin[:, :, None, :].astype(wide.dtype)
    left, right = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
