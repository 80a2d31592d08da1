"""Ratios, surrogates and regularisers once more as plain NumPy loops in float64; see `oracles`."""

import math

import numpy as np


def rows(batch):
    return [list(np.flatnonzero(row)) for row in np.asarray(batch.rollout.mask)]


def per_token(batch, formula):
    out = np.zeros(batch.advantages.shape)
    for i, tokens in enumerate(rows(batch)):
        for t in tokens:
            out[i, t] = formula(i, t)
    return out


def delta(scores, batch):
    old = batch.rollout.old_logprobs
    if old is None:
        return np.zeros(batch.advantages.shape)
    return per_token(batch, lambda i, t: float(scores.logprobs[i, t]) - float(old[i, t]))


def log_ratio(scores, batch, kind):
    """`kind`: the name of the ratio's builder, or `None`."""
    d, tokens = delta(scores, batch), rows(batch)
    if kind in (None, "token_ratio"):
        return d
    if kind == "sequence_ratio":
        return per_token(batch, lambda i, t: sum(d[i, s] for s in tokens[i]))
    return per_token(batch, lambda i, t: sum(d[i, s] for s in tokens[i]) / len(tokens[i]))


def advantage(batch):
    return per_token(batch, lambda i, t: float(batch.advantages[i, t]))


def clipped(scores, batch, low=0.2, high=0.2, dual=None, ratio=None):
    d, a = log_ratio(scores, batch, ratio), advantage(batch)

    def formula(i, t):
        r = math.exp(d[i, t])
        loss = max(-a[i, t] * r, -a[i, t] * min(max(r, 1 - low), 1 + high))
        return min(loss, -dual * a[i, t]) if dual is not None and a[i, t] < 0 else loss

    return per_token(batch, formula)


def unclipped(scores, batch, ratio=None):
    return -advantage(batch) * np.exp(log_ratio(scores, batch, ratio))


def cispo_weight(scores, batch, max_weight: float | None = 5.0, ratio=None):
    d = log_ratio(scores, batch, ratio)
    cap = math.inf if max_weight is None else max_weight
    return per_token(batch, lambda i, t: min(math.exp(d[i, t]), cap))


def cispo_around_one_weight(scores, batch, low=0.2, high=0.28, ratio=None):
    d = log_ratio(scores, batch, ratio)
    return per_token(batch, lambda i, t: min(max(math.exp(d[i, t]), 1 - low), 1 + high))


def dppo_weight(scores, batch, low=0.2, high=0.2, max_weight: float | None = 20.0, divergence="tv"):
    a, d = advantage(batch), delta(scores, batch)

    def formula(i, t):
        q = math.exp(float(scores.logprobs[i, t]))
        p = math.exp(float(scores.logprobs[i, t]) - d[i, t])
        far = abs(p - q)
        if divergence == "kl":
            # A world's log-probs may be positive; the library takes such a token for a sure one.
            p_other, q_other = (max(1 - x, np.finfo(float).tiny) for x in (p, q))
            far = p * math.log(p / q) + p_other * math.log(p_other / q_other)
        if (a[i, t] > 0 and q > p and far > high) or (a[i, t] < 0 and q < p and far > low):
            return 0.0
        return min(q / p, math.inf if max_weight is None else max_weight)

    return per_token(batch, formula)


def vespo_weight(
    scores,
    batch,
    positive_power=2.0,
    positive_decay=3.0,
    negative_power=3.0,
    negative_decay=2.0,
):
    d, a = log_ratio(scores, batch, "sequence_ratio"), advantage(batch)

    def formula(i, t):
        w = math.exp(min(max(d[i, t], -20), 20))
        k, lam = positive_power, positive_decay
        if a[i, t] < 0:
            k, lam = negative_power, negative_decay
        return math.exp(lam) * w**k * math.exp(-lam * w)

    return per_token(batch, formula)


def _reweighted(weight):
    return lambda scores, batch, **arguments: -weight(scores, batch, **arguments) * advantage(batch)


cispo, cispo_around_one = _reweighted(cispo_weight), _reweighted(cispo_around_one_weight)
dppo, vespo = _reweighted(dppo_weight), _reweighted(vespo_weight)


def _gate(rho, tau):
    return 1 / (1 + math.exp(-tau * (rho - 1)))


def sapo(scores, batch, positive=1.0, negative=1.05):
    a, d = advantage(batch), delta(scores, batch)

    def formula(i, t):
        tau = positive if a[i, t] > 0 else negative
        return -a[i, t] * 4 / tau * _gate(math.exp(d[i, t]), tau)

    return per_token(batch, formula)


def sapo_slope(scores, batch, positive=1.0, negative=1.05):
    """Derivative of each token's value by its own log-prob."""
    a, d = advantage(batch), delta(scores, batch)

    def formula(i, t):
        rho, tau = math.exp(d[i, t]), positive if a[i, t] > 0 else negative
        return -a[i, t] * 4 * _gate(rho, tau) * (1 - _gate(rho, tau)) * rho

    return per_token(batch, formula)


def _gmpo_row(d, a, tokens, i, low, high):
    total = 0.0
    for s in tokens:
        sign = np.sign(a[i, s])
        bounded = min(max(d[i, s], -low), high)
        total += sign * min(sign * d[i, s], sign * bounded)
    return math.exp(total / len(tokens))


def gmpo(scores, batch, low=0.4, high=0.4):
    d, a, tokens = delta(scores, batch), advantage(batch), rows(batch)
    return per_token(batch, lambda i, t: -a[i, t] * _gmpo_row(d, a, tokens[i], i, low, high))


def gmpo_slope(scores, batch, low=0.4, high=0.4):
    """Derivative of `sum(weights * value)` by each log-prob."""
    d, a, tokens = delta(scores, batch), advantage(batch), rows(batch)

    def formula(i, s):
        if (a[i, s] > 0 and d[i, s] > high) or (a[i, s] < 0 and d[i, s] < -low):
            return 0.0
        mean = _gmpo_row(d, a, tokens[i], i, low, high) / len(tokens[i])
        return sum(-float(batch.weights[i, t]) * a[i, t] * mean for t in tokens[i])

    return per_token(batch, formula)


def dro(scores, batch, beta):
    a, d = advantage(batch), delta(scores, batch)
    return per_token(
        batch, lambda i, t: -(float(scores.logprobs[i, t]) * a[i, t] - beta / 2 * d[i, t] ** 2)
    )


def squared_ratio(scores, batch):
    return delta(scores, batch) ** 2 / 2


def positive_nll(scores, batch, threshold=0.0):
    a = advantage(batch)
    return per_token(
        batch, lambda i, t: -float(scores.logprobs[i, t]) if a[i, t] > threshold else 0.0
    )


# --- covariance -----------------------------------------------------------------------------------


def covariance(batch):
    a, tokens = advantage(batch), rows(batch)
    old = batch.rollout.old_logprobs
    old = np.asarray(batch.rollout.logprobs if old is None else old, np.float64)
    places = [(i, t) for i, row in enumerate(tokens) for t in row]
    mean_a = sum(a[p] for p in places) / len(places)
    mean_old = sum(old[p] for p in places) / len(places)
    return per_token(batch, lambda i, t: (a[i, t] - mean_a) * (old[i, t] - mean_old))


def _mix(x):
    """MurmurHash3's finaliser."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def content_hash(batch, seed):
    r = batch.rollout
    bits = np.asarray(r.logprobs, np.float32).view(np.uint32)

    def token_hash(i, t):
        x = _mix(seed)
        for part in (int(r.tokens[i, t]), int(r.positions[i, t]) % 2**32, int(bits[i, t])):
            x = _mix(x ^ part)
        return x

    out = {}
    for i, tokens in enumerate(rows(batch)):
        own = {t: token_hash(i, t) for t in tokens}
        row = _mix(sum(own.values()) % 2**32)
        out |= {(i, t): _mix(x ^ row) for t, x in own.items()}
    return out


def _how_many(batch, share):
    return max(1, math.floor(share * sum(len(row) for row in rows(batch))))


def clip_cov_chosen(batch, share=0.0002, low=1.0, high=5.0, seed=0):
    cov, number = covariance(batch), content_hash(batch, seed)
    inside = [place for place in number if low < cov[place] < high]
    return sorted(inside, key=lambda place: number[place])[: _how_many(batch, share)]


def clip_cov(scores, batch, share=0.0002, low=1.0, high=5.0, epsilon=0.2, seed=0):
    value = clipped(scores, batch, epsilon, epsilon)
    for place in clip_cov_chosen(batch, share, low, high, seed):
        value[place] = 0.0
    return value


def kl_cov_chosen(batch, share=0.0002):
    cov, number = covariance(batch), content_hash(batch, 0)
    order = sorted(number, key=lambda place: (-cov[place], number[place]))
    return order[: _how_many(batch, share)]


def kl_cov(scores, batch, share=0.0002, coef=1.0):
    d, a = delta(scores, batch), advantage(batch)
    value = per_token(batch, lambda i, t: -a[i, t] * math.exp(d[i, t]))
    for place in kl_cov_chosen(batch, share):
        value[place] += coef * abs(d[place])
    return value


# --- weightings -----------------------------------------------------------------------------------


def weights(mask, formula):
    """`formula(length, live rows, all rows)` on each masked token."""
    mask = np.asarray(mask)
    live = sum(row.any() for row in mask)
    return np.array(
        [[formula(row.sum(), live, len(mask)) if m else 0.0 for m in row] for row in mask]
    )
