"""What Clip-Cov and KL-Cov share: a covariance per token, and the choice of k tokens.

All of it sees every row of a rollout at once and depends on no token's place in the arrays: not on
padding, the order of rows, or how the rollout is split into micro-batches or over devices.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt, UInt32

from .._types import Batch, Mask, PerToken, ScalarLike


def covariance(batch: Batch) -> PerToken:
    """Each masked token's share of the covariance of advantage and old log-prob.

    `(A - mean A)(logp - mean logp)`, means over all masked tokens; 0 elsewhere. The log-probs are
    the trainer's of the policy that sampled, or without those the sampler's own.
    """
    rollout = batch.rollout
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    mask = rollout.mask
    return jnp.where(mask, _centred(batch.advantages, mask) * _centred(old, mask), 0)


def _centred(x: PerToken, mask: Mask) -> PerToken:
    # Subtracting one of the values first makes equal values exactly 0.
    largest = jnp.max(jnp.where(mask, x, -jnp.inf))
    shifted = jnp.where(mask, x - jnp.where(jnp.any(mask), largest, 0), 0)
    count = jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)
    return shifted - jnp.sum(shifted) / count


def how_many(share: ScalarLike, mask: Mask) -> Int[Array, ""]:
    """`max(1, floor(share * N))` for N masked tokens."""
    count = jnp.sum(mask).astype(jnp.result_type(float))
    return jnp.maximum(jnp.floor(share * count), 1).astype(jnp.int32)


def largest(
    x: PerToken, tie: UInt[Array, "batch time"], mask: Mask, count: Int[Array, ""]
) -> Bool[Array, "batch time"]:
    """True on the `count` masked tokens of the largest `x`, among equals those of the least `tie`.

    On all masked tokens if there are fewer. Tokens equal in both come together, so that there may
    be more than `count`.
    """
    key = _as_unsigned(-x)
    bound = _bound(key, mask, count)
    surely, level = mask & (key < bound), mask & (key == bound)
    return surely | least(tie, level, count - jnp.sum(surely).astype(jnp.int32))


def least(
    x: UInt[Array, "batch time"], mask: Mask, count: Int[Array, ""]
) -> Bool[Array, "batch time"]:
    """True on the `count` masked tokens of the least `x`; equals of the last one come with it."""
    return mask & (x <= _bound(x, mask, count))


def _bound(x: UInt[Array, "batch time"], mask: Mask, count: Int[Array, ""]) -> UInt[Array, ""]:
    """The `count`-th smallest masked value, or the largest number there is if there are fewer."""
    ordered = jnp.sort(jnp.where(mask, x, jnp.array(jnp.iinfo(x.dtype).max, x.dtype)).ravel())
    return ordered[jnp.clip(count, 1, ordered.size) - 1]


def _as_unsigned(x: PerToken) -> UInt[Array, "batch time"]:
    """Integers in the order of the floats `x`; they sort ten times as fast on a CPU."""
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), f"uint{width}")
    top = jnp.array(1 << (width - 1), bits.dtype)
    return jnp.where(bits >= top, ~bits, bits | top)


def content_hash(batch: Batch, seed: ScalarLike) -> UInt32[Array, "batch time"]:
    """A pseudo-random number of each token, of what it is and not where it stands.

    Of the token id, its position, the sampler's log-prob (as float32 bits), the same of the row's
    other masked tokens, and the seed. Every one of these is exact whatever the batch looks like,
    which a mean over tokens is not. Completions that agree in all of it share their numbers.
    """
    rollout = batch.rollout
    bits = lax.bitcast_convert_type(rollout.logprobs.astype(jnp.float32), jnp.uint32)
    x = _mix(jnp.broadcast_to(jnp.asarray(seed).astype(jnp.uint32), bits.shape))
    for part in (rollout.tokens.astype(jnp.uint32), rollout.positions.astype(jnp.uint32), bits):
        x = _mix(x ^ part)
    row = jnp.sum(jnp.where(rollout.mask, x, jnp.uint32(0)), axis=1, dtype=jnp.uint32)
    return _mix(x ^ _mix(row)[:, None])


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32 bits in which every input bit reaches every output bit (MurmurHash3's)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
