"""Every factor once more, as plain NumPy loops in float64. See `oracles.py`."""

import jax.numpy as jnp
import numpy as np
from oracles import _rows, kl_estimate

from eqrl._types import Batch, Rollout, Scores


def line(gap, *, advantages=None, entropy=None, rows=1, current=None):
    """Rows of tokens with given `logp_old - logp_sampler`, every token of weight 1."""
    gap = jnp.asarray(gap, float).reshape(rows, -1)
    zeros = jnp.zeros_like(gap)
    roll = zeros - 1.0
    rollout = Rollout(
        tokens=zeros.astype(jnp.int32),
        mask=jnp.ones(gap.shape, bool),
        positions=zeros.astype(jnp.int32),
        logprobs=roll,
        group=jnp.zeros(rows, jnp.int32),
        truncated=jnp.zeros(rows, bool),
        old_logprobs=roll + gap,
        old_entropy=None if entropy is None else jnp.asarray(entropy, float).reshape(gap.shape),
    )
    a = zeros + 1 if advantages is None else jnp.asarray(advantages, float).reshape(gap.shape)
    batch = Batch(rollout, a, zeros + 1, zeros + 1 / zeros.size)
    return Scores(roll + gap if current is None else current, zeros), batch


def token_mean_of(x, batch):
    return np.asarray(x)[np.asarray(batch.rollout.mask)].mean()


def old_of(scores, batch):
    old = batch.rollout.old_logprobs
    return np.asarray(scores.logprobs if old is None else old, float)


def gaps(scores, batch):
    """For each row, a dictionary from token to `logp_old - logp_sampler`."""
    old, roll = old_of(scores, batch), np.asarray(batch.rollout.logprobs, float)
    return [{t: old[i, t] - roll[i, t] for t in row} for i, row in enumerate(_rows(_mask(batch)))]


def _mask(batch):
    return np.asarray(batch.rollout.mask)


def _fill(scores, batch, formula):
    """`formula(gap of the token, gaps of its row)` on each masked token."""
    out = np.zeros(_mask(batch).shape)
    for i, row in enumerate(gaps(scores, batch)):
        for t, gap in row.items():
            out[i, t] = formula(gap, list(row.values()))
    return out


def tis(scores, batch, cap=2.0):
    return _fill(scores, batch, lambda gap, row: min(np.exp(gap), cap))


def tis_sequence(scores, batch, cap=2.0):
    return _fill(scores, batch, lambda gap, row: min(np.prod(np.exp(row)), cap))


def clamp_weights(scores, batch, low=0.5, high=5.0):
    return _fill(scores, batch, lambda gap, row: min(max(np.exp(gap), low), high))


def icepop(scores, batch, low=0.5, high=5.0):
    return _fill(scores, batch, lambda gap, row: np.exp(gap) if low <= np.exp(gap) <= high else 0.0)


def sequence_mask(scores, batch, cap=3.0, weight="sequence"):
    def formula(gap, row):
        product = np.prod(np.exp(row))
        if product > cap:
            return 0.0
        return product if weight == "sequence" else np.exp(gap)

    return _fill(scores, batch, formula)


def geometric_mask(scores, batch, low=0.999, high=1.002):
    def formula(gap, row):
        mean = np.prod(np.exp(row)) ** (1 / len(row))
        return np.exp(gap) if low <= mean <= high else 0.0

    return _fill(scores, batch, formula)


def kl_mask(scores, batch, threshold, estimator="k3", reduce="mean"):
    together = {"mean": np.mean, "sum": np.sum, "max": np.max}[reduce]

    def formula(gap, row):
        found = [kl_estimate(-one, estimator) for one in row]
        return 1.0 if together(found) <= threshold else 0.0

    return _fill(scores, batch, formula)


def _bernoulli(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def binary_kl_mask(scores, batch, threshold=2.0):
    old, roll = old_of(scores, batch), np.asarray(batch.rollout.logprobs, float)
    out = np.zeros(old.shape)
    for i, row in enumerate(_rows(_mask(batch))):
        for t in row:
            p, q = (min(max(np.exp(x[i, t]), 1e-6), 1 - 1e-6) for x in (old, roll))
            out[i, t] = max(_bernoulli(p, q), _bernoulli(q, p)) <= threshold
    return out


def top_entropy(scores, batch, share=0.2):
    entropy, mask = np.asarray(batch.rollout.old_entropy, float), _mask(batch)
    threshold = np.quantile(entropy[mask], 1 - share)
    return np.where(mask & (np.where(mask, entropy, 0) >= threshold), 1.0, 0.0)


def m2po(scores, batch, budget=0.04, everywhere=False):
    """Algorithm 1 of the paper, step by step."""
    squares, out = {}, np.where(_mask(batch), 1.0, 0.0)
    for i, row in enumerate(gaps(scores, batch)):
        for t, gap in row.items():
            if everywhere or float(batch.advantages[i, t]) * gap > 0:
                squares[i, t] = gap**2
    while squares and np.mean(list(squares.values())) > budget:
        worst = max(squares.values())
        for place in [place for place, square in squares.items() if square == worst]:
            out[place] = 0.0
            del squares[place]
    return out


def opsm(scores, batch, delta, against="sampler"):
    now = np.asarray(scores.logprobs, float)
    then = np.asarray(batch.rollout.logprobs if against == "sampler" else old_of(scores, batch))
    out = np.zeros(now.shape)
    for i, row in enumerate(_rows(_mask(batch))):
        if row:
            bad = np.mean([float(batch.advantages[i, t]) for t in row]) < 0
            far = np.mean([then[i, t] - now[i, t] for t in row]) > delta
            out[i, row] = 0.0 if bad and far else 1.0
    return out


def adaptive_entropy(scores, batch, target=0.2, step=0.005, start=0.0, least=0.0, most=1.0):
    entropy, mask = np.asarray(batch.rollout.old_entropy, float), _mask(batch)
    return np.where(mask, start if entropy[mask].mean() <= target else 0.0, 0.0)


def drop_truncated(scores, batch):
    return np.where(_mask(batch) & ~np.asarray(batch.rollout.truncated)[:, None], 1.0, 0.0)


def value_loss(scores, batch, clip: float | None = 0.2, huber: float | None = None):
    def loss(error):
        if huber is None or abs(error) <= huber:
            return error**2 / 2
        return huber * (abs(error) - huber / 2)

    out = np.zeros(_mask(batch).shape)
    for i, row in enumerate(_rows(_mask(batch))):
        for t in row:
            v, g = float(scores.values[i, t]), float(batch.targets[i, t])
            old = float(batch.rollout.values[i, t])
            other = v if clip is None else min(max(v, old - clip), old + clip)
            out[i, t] = max(loss(v - g), loss(other - g))
    return out


def kl(scores, batch, estimator="k3", gradient=None, limit=None, input_limit=None, unbiased=False):
    del gradient
    now, old = np.asarray(scores.logprobs, float), old_of(scores, batch)
    reference = np.asarray(batch.rollout.ref_logprobs, float)
    out = np.zeros(now.shape)
    for i, row in enumerate(_rows(_mask(batch))):
        for t in row:
            d = now[i, t] - reference[i, t]
            if input_limit is not None:
                d = min(max(d, -input_limit), input_limit)
            value = kl_estimate(d, estimator)
            if limit is not None:
                value = min(max(value, -limit), limit)
            out[i, t] = value * (np.exp(now[i, t] - old[i, t]) if unbiased else 1.0)
    return out
