"""What the tests of terms share: which terms, on which batches, and how to take their slopes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from eqrl import _losses as losses
from eqrl._types import Batch, Rollout, Scores


RATIOS = ["token_ratio", "sequence_ratio", "geometric_ratio", "geometric_token_ratio"]
# Gradients reach the value as it stands: finite differences apply.
SMOOTH = [
    *(("clipped", {"low": 0.1, "high": 0.3, "ratio": name}) for name in RATIOS),
    ("clipped", {"low": 0.05, "high": 0.05, "dual": 1.1, "ratio": "geometric_ratio"}),
    ("unclipped", {}),
    ("unclipped", {"ratio": "geometric_ratio"}),
    ("sapo", {}),
    ("sapo", {"positive": 2.0, "negative": 5.0}),
    ("gmpo", {}),
    ("gmpo", {"low": 0.2, "high": 0.1}),
    ("dro", {"beta": 0.7}),
    ("squared_ratio", {}),
    ("clip_cov", {}),
    ("clip_cov", {"share": 0.1, "low": 0.1, "high": 2.0, "epsilon": 0.1, "seed": 3}),
    ("kl_cov", {}),
    ("kl_cov", {"share": 0.25, "coef": 0.3}),
    ("positive_nll", {}),
    ("positive_nll", {"threshold": 0.5}),
]
# The weight is detached: the gradient is that of `reinforce` times it.
REWEIGHTED = [
    ("cispo", {}),
    ("cispo", {"max_weight": 1.1}),
    ("cispo", {"max_weight": None}),
    ("cispo", {"max_weight": 1.05, "ratio": "geometric_ratio"}),
    ("cispo", {"max_weight": 1.05, "ratio": "sequence_ratio"}),
    ("cispo_around_one", {}),
    ("cispo_around_one", {"low": 0.05, "high": 0.1, "ratio": "geometric_ratio"}),
    ("dppo", {}),
    ("dppo", {"low": 0.02, "high": 0.05, "max_weight": 1.2}),
    ("dppo", {"low": 0.02, "high": 0.05, "max_weight": None}),
    ("dppo", {"low": 0.01, "high": 0.03, "divergence": "kl"}),
    ("vespo", {}),
    (
        "vespo",
        {
            "positive_power": 1.0,
            "positive_decay": 0.5,
            "negative_power": 2.0,
            "negative_decay": 4.0,
        },
    ),
]


def build(name, arguments):
    if "ratio" in arguments:
        arguments = arguments | {"ratio": getattr(losses, arguments["ratio"])()}
    return getattr(losses, name)(**arguments)


def world(seed=0):
    """`oracles.loss_world` with log-probs that could be: below 0."""
    scores, batch = oracles.loss_world(seed)
    lower = lambda x: x - 6.0  # noqa: E731
    rollout = dataclasses.replace(
        batch.rollout,
        logprobs=lower(batch.rollout.logprobs),
        old_logprobs=lower(batch.rollout.need("old_logprobs")),
    )
    # Some tokens sure, some rare: distances of probabilities must matter too.
    return near_one(scores, dataclasses.replace(batch, rollout=rollout))


def near_one(scores, batch):
    old = batch.rollout.need("old_logprobs")
    moved = scores.logprobs - 6.0 - old
    high = jnp.asarray(np.indices(old.shape).sum(axis=0) % 2 == 0)
    old = jnp.where(high, -jnp.exp(0.5 * (old + 5.0)), old)
    new = jnp.minimum(old + moved, -1e-3)
    batch = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, old_logprobs=old))
    return dataclasses.replace(scores, logprobs=new), batch


def ready(objective, batch):
    return dataclasses.replace(batch, prepared=objective.prepare(batch, objective.init())[0])


def loss_of(objective, scores, batch):
    return jnp.sum(batch.weights * objective(scores, batch)[0])


def slope_of(objective, scores, batch):
    gradient = jax.grad(loss_of, argnums=1)(objective, scores, ready(objective, batch))
    return np.asarray(gradient.logprobs)


def masked_mean(x, batch):
    return np.asarray(x)[np.asarray(batch.rollout.mask)].mean()


def table(delta, advantage, mask=None, old=0.0, *, dtype=None):
    """A batch with given log-ratios to an old log-prob, every masked token of weight 1."""
    delta = jnp.asarray(delta, dtype or float)
    mask = jnp.ones(delta.shape, bool) if mask is None else jnp.asarray(mask, bool)
    advantage = jnp.broadcast_to(jnp.asarray(advantage, delta.dtype), delta.shape)
    old, zeros = jnp.full_like(delta, old), jnp.zeros_like(delta)
    rollout = Rollout(
        tokens=jnp.zeros(delta.shape, jnp.int32),
        mask=mask,
        positions=jnp.zeros(delta.shape, jnp.int32),
        logprobs=old,
        group=jnp.zeros(len(delta), jnp.int32),
        truncated=jnp.zeros(len(delta), bool),
        old_logprobs=old,
    )
    live = mask.astype(delta.dtype)
    return Scores(old + delta, zeros), Batch(rollout, advantage, live, live / jnp.sum(live))


def same_advantage(scores, batch):
    """One advantage per completion."""
    first = jnp.broadcast_to(batch.advantages[:, 2:3], batch.advantages.shape)
    return scores, dataclasses.replace(batch, advantages=first)
