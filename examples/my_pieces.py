"""Pieces of one's own: `--plugins examples/my_pieces.py`. docs/extending.md walks through them."""

import jax.numpy as jnp

import eqrl


def length_discount(scale: float = 100.0):
    """Divides a reward by 1 + length / scale."""
    return eqrl.stateless(_length_discount, builder=length_discount, scale=scale)


def _length_discount(signal, rollout, *, scale):
    length = jnp.sum(rollout.mask, axis=1, keepdims=True).astype(signal.dtype)
    return signal / (1 + length / scale)


class record(eqrl.AbstractTransform):
    """Score minus the best score of earlier batches, which fades by `decay` a batch."""

    decay: float = 0.99
    reads_total = spreads = True

    def init(self):
        return jnp.zeros(())

    def update(self, signal, state, rollout):
        total, live = eqrl.row_total(signal, rollout.mask), eqrl.live_rows(rollout.mask)
        best = jnp.max(jnp.where(live, total, -jnp.inf))
        return eqrl.spread(total - state, rollout.mask), jnp.maximum(self.decay * state, best)


def smooth(width: float = 0.2):
    """-A * width * tanh((ratio - 1) / width): PPO's clip without its corners."""
    return eqrl.term(_smooth, builder=smooth, width=width)


def _smooth(scores, batch, *, width):
    ratio = jnp.exp(eqrl.log_ratio(scores, batch))
    value = -batch.advantages * width * jnp.tanh((ratio - 1) / width)
    return value, {"loss/policy": eqrl.weighted(value, batch)}


def sqrt_length():
    """Completions weigh by the square root of their length, divided by their number."""
    return eqrl.weighting(_sqrt_length, builder=sqrt_length)


def _sqrt_length(mask):
    length = jnp.sum(mask, axis=1, keepdims=True).astype(float)
    weight = 1 / jnp.sqrt(jnp.maximum(length, 1)) / jnp.maximum(jnp.sum(length > 0), 1)
    return jnp.where(mask, weight, 0.0)
