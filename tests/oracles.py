"""Every estimator, loss and weighting once more, as plain NumPy loops in float64.

Written from the formulas, with explicit loops over rows and tokens and none of the library's
helpers, so that a shared mistake is unlikely. `world` makes the awkward rollouts that the tests
run on: gaps in the mask, ragged groups in shuffled order, unused ids, empty rows.
"""

import jax.numpy as jnp
import numpy as np

from eqrl._types import Batch, Rollout, Scores


GROUP = np.array([3, 7, 3, 0, 7, 3, 9, 0, 3, 9, 7])  # sizes 2, 4, 3 and 2; ids with holes


def world(seed: int = 0, *, dtype=None) -> tuple[jnp.ndarray, Rollout]:
    """A signal and a rollout of 11 rows and 8 columns; rows 5 and 9 are empty."""
    rng = np.random.default_rng(seed)
    dtype = jnp.result_type(float) if dtype is None else dtype
    rows, time = len(GROUP), 8
    mask = rng.random((rows, time)) < 0.6
    mask[:, 2], mask[:, 5] = True, rng.random(rows) < 0.5
    mask[[5, 9]] = False
    real = lambda scale: jnp.asarray(scale * rng.standard_normal((rows, time)), dtype)  # noqa: E731
    logprobs = real(1.0)
    rollout = Rollout(
        tokens=jnp.asarray(rng.integers(0, 9, (rows, time)), jnp.int32),
        mask=jnp.asarray(mask),
        positions=jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (rows, time)),
        logprobs=logprobs,
        group=jnp.asarray(GROUP, jnp.int32),
        truncated=jnp.asarray(rng.random(rows) < 0.3),
        rewards=jnp.asarray(rng.integers(0, 3, (rows, 2)), dtype),
        old_logprobs=logprobs + real(0.1),
        ref_logprobs=logprobs + real(0.5),
        values=real(1.0),
        **_extras(seed, rows, time, dtype),
    )
    return real(1.0), rollout


def _extras(seed, rows, time, dtype):
    """Further fields, from numbers of their own: the others stay what they were."""
    rng = np.random.default_rng(seed + 2000)
    return {
        "version": jnp.asarray(rng.integers(0, 5, rows), jnp.int32),
        "old_entropy": jnp.asarray(rng.random((rows, time)), dtype),
        "sum_pi_squared": jnp.asarray(rng.random((rows, time)), dtype),
        "greedy_rewards": jnp.asarray(rng.standard_normal(rows), dtype),
    }


def loss_world(seed: int = 0, *, dtype=None) -> tuple[Scores, Batch]:
    """Scores and a batch with random weights on a `world`."""
    advantages, rollout = world(seed, dtype=dtype)
    rng = np.random.default_rng(seed + 1000)
    shape, dtype = advantages.shape, advantages.dtype
    real = lambda scale: jnp.asarray(scale * rng.standard_normal(shape), dtype)  # noqa: E731
    live = rollout.mask.astype(dtype)
    weights = jnp.asarray(rng.random(shape), dtype) * live
    share = live / jnp.sum(live)
    values = rollout.need("values") + real(0.3)
    scores = Scores(rollout.need("old_logprobs") + real(0.3), jnp.abs(real(1.0)), values)
    return scores, Batch(rollout, advantages, weights, share, real(1.0))


def _rows(mask):
    return [list(np.flatnonzero(row)) for row in np.asarray(mask)]


def _totals(signal, mask):
    return [sum(float(signal[i, t]) for t in tokens) for i, tokens in enumerate(_rows(mask))]


def _spread(row, mask):
    out = np.zeros(mask.shape)
    for i, tokens in enumerate(_rows(mask)):
        for t in tokens:
            out[i, t] = row[i]
    return out


def _peers(rollout):
    """For each live row, the live rows of its group; for an empty row nothing."""
    live = [bool(tokens) for tokens in _rows(rollout.mask)]
    group = np.asarray(rollout.group)
    return [
        [j for j in range(len(group)) if live[j] and group[j] == group[i]] if live[i] else []
        for i in range(len(group))
    ]


def _by_group(signal, rollout, formula):
    total = _totals(signal, rollout.mask)
    row = np.zeros(len(total))
    for i, peers in enumerate(_peers(rollout)):
        if len(peers) > 1:  # alone, there is nothing to compare with: 0
            row[i] = formula(total[i], [total[j] for j in peers])
    return _spread(row, np.asarray(rollout.mask))


def _by_batch(signal, rollout, formula):
    total = _totals(signal, rollout.mask)
    live = [i for i, tokens in enumerate(_rows(rollout.mask)) if tokens]
    row = np.zeros(len(total))
    for i in live:
        row[i] = formula(total[i], [total[j] for j in live])
    return _spread(row, np.asarray(rollout.mask))


def group_norm(signal, rollout, ddof=1, eps=1e-6):
    return _by_group(
        signal, rollout, lambda r, peers: (r - np.mean(peers)) / (np.std(peers, ddof=ddof) + eps)
    )


def group_center(signal, rollout):
    return _by_group(signal, rollout, lambda r, peers: r - np.mean(peers))


def rloo(signal, rollout):
    return _by_group(signal, rollout, lambda r, peers: r - (sum(peers) - r) / (len(peers) - 1))


def batch_center(signal, rollout):
    return _by_batch(signal, rollout, lambda r, peers: r - np.mean(peers))


def batch_norm(signal, rollout, ddof=1, eps=1e-8):
    return _by_batch(
        signal, rollout, lambda r, peers: (r - np.mean(peers)) / (np.std(peers, ddof=ddof) + eps)
    )


def whiten(signal, rollout, ddof=1, eps=1e-8):
    mask = np.asarray(rollout.mask)
    tokens = np.asarray(signal)[mask]
    out = np.zeros(mask.shape)
    out[mask] = (tokens - tokens.mean()) / np.sqrt(tokens.var(ddof=ddof) + eps)
    return out


def returns(signal, rollout, gamma=1.0):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        running = 0.0
        for t in reversed(tokens):
            running = float(signal[i, t]) + gamma * running
            out[i, t] = running
    return out


def gae(signal, rollout, gamma=1.0, lam=0.95):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        advantage = following = 0.0
        for t in reversed(tokens):
            value = float(rollout.values[i, t])
            delta = float(signal[i, t]) + gamma * following - value
            advantage = delta + gamma * lam * advantage
            following = value
            out[i, t] = advantage
    return out


def add_values(signal, rollout):
    return np.where(rollout.mask, np.asarray(signal) + np.asarray(rollout.values), 0.0)


def kl_estimate(d, estimator):
    return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) + d - 1}[estimator]


def kl_penalty(signal, rollout, coef, estimator="k1"):
    out = np.zeros(signal.shape)
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    for i, tokens in enumerate(_rows(rollout.mask)):
        for t in tokens:
            d = float(old[i, t]) - float(rollout.ref_logprobs[i, t])
            out[i, t] = float(signal[i, t]) - coef * kl_estimate(d, estimator)
    return out


def _on_last(signal, rollout, amount):
    out = np.where(rollout.mask, np.asarray(signal), 0.0)
    for i, tokens in enumerate(_rows(rollout.mask)):
        if tokens:
            out[i, tokens[-1]] += amount(len(tokens))
    return out


def overlong(signal, rollout, max_tokens, buffer, penalty=1.0):
    def amount(length):
        over = length - (max_tokens - buffer)
        return -penalty * min(over / buffer, 1.0) if over > 0 else 0.0

    return _on_last(signal, rollout, amount)


def shift(signal, rollout, offset):
    return _on_last(signal, rollout, lambda length: offset)


def clip(signal, rollout, limit):
    return np.where(rollout.mask, np.clip(np.asarray(signal), -limit, limit), 0.0)


def scale(signal, rollout, factor):
    return np.where(rollout.mask, factor * np.asarray(signal), 0.0)


def ema_baseline(signals, rollouts, decay=0.95):
    """Advantages of a sequence of batches."""
    means, out = [], []
    for signal, rollout in zip(signals, rollouts, strict=True):
        total = _totals(signal, rollout.mask)
        live = [i for i, tokens in enumerate(_rows(rollout.mask)) if tokens]
        ages = decay ** np.arange(len(means))[::-1]
        baseline = float(np.dot(ages, means) / ages.sum()) if means else 0.0
        out.append(_spread([r - baseline for r in total], np.asarray(rollout.mask)))
        means.append(np.mean([total[i] for i in live]))
    return out


def _per_token(scores, batch, formula):
    out = np.zeros(batch.advantages.shape)
    for i, tokens in enumerate(_rows(batch.rollout.mask)):
        for t in tokens:
            out[i, t] = formula(i, t)
    return out


def clipped(scores, batch, low=0.2, high=0.2, dual=None):
    old = batch.rollout.old_logprobs
    old = scores.logprobs if old is None else old

    def formula(i, t):
        a, ratio = float(batch.advantages[i, t]), np.exp(scores.logprobs[i, t] - old[i, t])
        loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        return min(loss, -dual * a) if dual is not None and a < 0 else loss

    return _per_token(scores, batch, formula)


def reinforce(scores, batch):
    return _per_token(scores, batch, lambda i, t: -float(batch.advantages[i, t]))


def kl(scores, batch, estimator="k3"):
    def formula(i, t):
        d = float(scores.logprobs[i, t]) - float(batch.rollout.ref_logprobs[i, t])
        return kl_estimate(d, estimator)

    return _per_token(scores, batch, formula)


def entropy_bonus(scores, batch):
    return _per_token(scores, batch, lambda i, t: -float(scores.entropy[i, t]))


def value_loss(scores, batch, clip: float | None = 0.2):
    def formula(i, t):
        v, g = float(scores.values[i, t]), float(batch.targets[i, t])
        if clip is None:
            return 0.5 * (v - g) ** 2
        old = float(batch.rollout.values[i, t])
        return 0.5 * max((v - g) ** 2, (min(max(v, old - clip), old + clip) - g) ** 2)

    return _per_token(scores, batch, formula)


def _weights(mask, formula):
    rows = _rows(mask)
    live = sum(bool(tokens) for tokens in rows)
    count = sum(len(tokens) for tokens in rows)
    out = np.zeros(np.asarray(mask).shape)
    for i, tokens in enumerate(rows):
        for t in tokens:
            out[i, t] = formula(len(tokens), live, count)
    return out


def token_mean(mask):
    return _weights(mask, lambda length, live, count: 1 / count)


def sequence_mean(mask):
    return _weights(mask, lambda length, live, count: 1 / (live * length))


def sequence_sum(mask):
    return _weights(mask, lambda length, live, count: 1 / live)


def constant_length(mask, length):
    constant = length
    return _weights(mask, lambda length, live, count: 1 / (live * constant))
