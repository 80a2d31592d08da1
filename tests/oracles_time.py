"""The estimators over time, turns, lengths and the reference policy once more, as NumPy loops.

As in `oracles.py`: written from the formulas, in float64, with none of the library's helpers.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles

from eqrl._types import Rollout


def world(seed: int = 0, *, dtype=None):
    """`oracles.world` with log-probs at most 0 and squared probabilities that fit them."""
    signal, rollout = oracles.world(seed, dtype=dtype)
    rng = np.random.default_rng(seed + 3000)
    old = -np.abs(np.asarray(rollout.logprobs, float))
    others = (1 - np.exp(old)) * rng.random(old.shape)  # the rest of the mass, spread somehow
    like = lambda x: jnp.asarray(x, signal.dtype)  # noqa: E731
    return signal, dataclasses.replace(
        rollout,
        old_logprobs=like(old),
        logprobs=like(old + 0.4 * rng.standard_normal(old.shape)),
        sum_pi_squared=like(np.exp(2 * old) + others**2),
    )


def run(transform, signal, rollout):
    return transform.update(signal, transform.init(), rollout)[0]


def rows(signal, mask, group=None, dtype=float, **fields):
    """A rollout of the given rows, one group unless told otherwise."""
    mask = jnp.asarray(np.asarray(mask, bool))
    shape, n = mask.shape, len(mask)
    number = lambda x: jnp.broadcast_to(jnp.asarray(x, dtype), shape)  # noqa: E731
    rollout = Rollout(
        tokens=jnp.zeros(shape, jnp.int32),
        mask=mask,
        positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        logprobs=number(fields.pop("logprobs", 0.0)),
        group=jnp.zeros(n, jnp.int32) if group is None else jnp.asarray(group, jnp.int32),
        truncated=jnp.zeros(n, bool),
        **{name: number(x) for name, x in fields.items()},
    )
    return number(signal), rollout


def at(array, row, column):
    return float(np.asarray(array)[row, column])


def _rows(mask):
    return [list(np.flatnonzero(row)) for row in np.asarray(mask)]


def _groups(rollout):
    """Lists of the live rows of each group."""
    live = np.asarray(rollout.mask).any(axis=1)
    group = np.asarray(rollout.group)
    return [np.flatnonzero(live & (group == g)) for g in np.unique(group[live])]


def returns_decay(signal, rollout, gamma=1.0):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        for t in tokens:
            out[i, t] = sum(gamma ** (s - t) * float(signal[i, s]) for s in tokens if s >= t)
    return out


def gae_decay(signal, rollout, gamma=1.0, lam=0.95):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        advantage = following = 0.0
        for t in range(tokens[-1] if tokens else -1, -1, -1):
            trained = t in tokens
            value = float(rollout.values[i, t]) if trained else 0.0
            reward = float(signal[i, t]) if trained else 0.0
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
            out[i, t] = advantage if trained else 0.0
    return out


def gae_adaptive(signal, rollout, gamma=1.0, alpha=0.05):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        if not tokens:
            continue
        lam = min(max(1 - 1 / (alpha * len(tokens)), 0.0), 1.0)
        values = [float(rollout.values[i, t]) for t in tokens] + [0.0]
        delta = [
            float(signal[i, t]) + gamma * values[k + 1] - values[k] for k, t in enumerate(tokens)
        ]
        for k, t in enumerate(tokens):
            out[i, t] = sum((gamma * lam) ** n * d for n, d in enumerate(delta[k:]))
    return out


def turns(tokens):
    """Runs of consecutive columns."""
    found = []
    for t in tokens:
        if found and found[-1][-1] == t - 1:
            found[-1].append(t)
        else:
            found.append([t])
    return found


def turn_returns(signal, rollout, gamma=1.0):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        running = 0.0
        for turn in reversed(turns(tokens)):
            running = sum(float(signal[i, t]) for t in turn) + gamma * running
            out[i, turn] = running
    return out


def turn_gae(signal, rollout, gamma=1.0, lam=0.95):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        advantage = following = 0.0
        for turn in reversed(turns(tokens)):
            value = float(rollout.values[i, turn[0]])
            reward = sum(float(signal[i, t]) for t in turn)
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
            out[i, turn] = advantage
    return out


def _difference(rollout, i, t):
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    return float(old[i, t]) - float(rollout.ref_logprobs[i, t])


def kl_penalty(signal, rollout, coef, estimator="k1", limit=None):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        for t in tokens:
            k = oracles.kl_estimate(_difference(rollout, i, t), estimator)
            k = k if limit is None else min(max(k, -limit), limit)
            out[i, t] = float(signal[i, t]) - coef * k
    return out


def next_coef(rollout, coef, target, horizon, estimator):
    """The controller's coefficient after this batch."""
    means = [
        np.mean([oracles.kl_estimate(_difference(rollout, i, t), estimator) for t in tokens])
        for i, tokens in enumerate(_rows(rollout.mask))
        if tokens
    ]
    error = min(max(np.mean(means) / target - 1, -0.2), 0.2)
    return coef * (1 + error * len(means) / horizon)


def kl_shaping(signal, rollout, coef):
    where = [(i, t) for i, tokens in enumerate(_rows(rollout.mask)) for t in tokens]
    mean = np.mean([_difference(rollout, i, t) for i, t in where])
    out = np.zeros(signal.shape)
    for i, t in where:
        out[i, t] = float(signal[i, t]) + coef * (mean - _difference(rollout, i, t))
    return out


def optimal_token_baseline(signal, rollout, cap: float | None = 2.0):
    rows, out = _rows(rollout.mask), np.zeros(signal.shape)
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs

    def weight(i, t):
        energy = 1 - 2 * np.exp(float(old[i, t])) + float(rollout.sum_pi_squared[i, t])
        if cap is None or rollout.old_logprobs is None:
            return energy
        return energy * min(np.exp(float(old[i, t]) - float(rollout.logprobs[i, t])), cap) ** 2

    for members in _groups(rollout):
        for k in range(max(len(rows[i]) for i in members)):
            there = [i for i in members if k < len(rows[i])]
            togo = {i: sum(float(signal[i, t]) for t in rows[i][k:]) for i in there}
            path = {i: sum(weight(i, t) for t in rows[i][: k + 1]) for i in there}
            baseline = sum(togo[i] * path[i] for i in there) / sum(path.values())
            for i in there:
                out[i, rows[i][k]] = togo[i] - baseline
    return out


def _on_last(signal, rollout, change):
    """The signal plus `change(row, group's live rows, lengths, passed)` on last tokens."""
    rows = _rows(rollout.mask)
    out = np.where(rollout.mask, np.asarray(signal), 0.0)
    total = [sum(float(signal[i, t]) for t in tokens) for i, tokens in enumerate(rows)]
    for members in _groups(rollout):
        for i in members:
            out[i, rows[i][-1]] += change(i, members, [len(r) for r in rows], total)
    return out


def length_cost(signal, rollout, coef, threshold=0.0):
    def change(i, members, length, total):
        passed = np.mean([total[j] > threshold for j in members])
        return -coef * passed * length[i] / max(length[j] for j in members)

    return _on_last(signal, rollout, change)


def length_reward(signal, rollout, coef, threshold=0.0):
    def change(i, members, length, total):
        low, high = min(length[j] for j in members), max(length[j] for j in members)
        if low == high:
            return 0.0
        lam = 0.5 - (length[i] - low) / (high - low)
        return coef * (lam if total[i] > threshold else min(0.0, lam))

    return _on_last(signal, rollout, change)
