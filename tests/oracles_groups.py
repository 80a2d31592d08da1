"""Loops for the baselines over groups and their options, as `oracles.py` has for the others."""

import itertools

import numpy as np
from oracles import _by_group, _on_last, _peers, _rows, _spread, _totals


def _others(total, peers, i):
    return [total[j] for j in peers if j != i]


def group_norm(signal, rollout, ddof=1, eps=1e-6, deviation="group"):
    total = _totals(signal, rollout.mask)
    live = [total[i] for i, tokens in enumerate(_rows(rollout.mask)) if tokens]
    row = np.zeros(len(total))
    for i, peers in enumerate(_peers(rollout)):
        if len(peers) < 2:
            continue
        mine = [total[j] for j in peers]
        if deviation == "group":
            row[i] = (total[i] - np.mean(mine)) / (np.std(mine, ddof=ddof) + eps)
        elif deviation == "batch":
            row[i] = (total[i] - np.mean(mine)) / (np.std(live, ddof=ddof) + eps)
        else:
            others = _others(total, peers, i)
            row[i] = total[i] - np.mean(others)
            if len(others) > ddof and max(others) > min(others):
                row[i] /= np.std(others, ddof=ddof) + eps
    return _spread(row, np.asarray(rollout.mask))


def opo(signal, rollout):
    total, length = _totals(signal, rollout.mask), [len(x) for x in _rows(rollout.mask)]
    row = np.zeros(len(total))
    for i, peers in enumerate(_peers(rollout)):
        if peers:
            weighted = sum(length[j] * total[j] for j in peers)
            row[i] = total[i] - weighted / sum(length[j] for j in peers)
    return _spread(row, np.asarray(rollout.mask))


def gpg(signal, rollout, f_norm=1.0):
    total = _totals(signal, rollout.mask)
    live = [i for i, tokens in enumerate(_rows(rollout.mask)) if tokens]
    scoring = [i for i in live if total[i] != 0]
    alpha = len(live) / len(scoring) if scoring else 0.0
    return _by_group(signal, rollout, lambda r, peers: alpha * (r - np.mean(peers)) / f_norm)


def max_rl(signal, rollout):
    def formula(r, peers):
        mean = np.mean(peers)
        return (r - mean) / mean if mean > 0 else 0.0

    return _by_group(signal, rollout, formula)


def remax(signal, rollout):
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        for t in tokens:
            togo = sum(float(signal[i, s]) for s in tokens if s >= t)
            out[i, t] = togo - float(rollout.greedy_rewards[i])
    return out


def best_of_subsets(scores, k):
    """For each score, what it adds to the maximum of the subsets of size k that hold it."""
    k, n = min(k, len(scores)), len(scores)
    gains = []
    for i in range(n):
        rest = [scores[j] for j in range(n) if j != i]
        lead = [max(*part, scores[i]) - max(part) for part in itertools.combinations(rest, k - 1)]
        gains.append(np.mean(lead))
    return gains


def pass_at_k(signal, rollout, k, eps=None):
    total = _totals(signal, rollout.mask)
    row = np.zeros(len(total))
    for i, peers in enumerate(_peers(rollout)):
        if len(peers) > 1:
            scores = [total[j] for j in peers]
            row[i] = best_of_subsets(scores, k)[peers.index(i)]
            if eps is not None:
                row[i] /= np.std(scores, ddof=1) + eps
    return _spread(row, np.asarray(rollout.mask))


def component(signal, rollout, index):
    rewards = np.asarray(rollout.rewards)
    out = np.zeros(signal.shape)
    for i, tokens in enumerate(_rows(rollout.mask)):
        if tokens:
            out[i, tokens[-1]] = rewards[i, index]
    return out


def gdpo(signal, rollout, weights=None, ddof=1, eps=1e-6):
    rewards = np.asarray(rollout.rewards)
    weights = [1.0] * rewards.shape[1] if weights is None else weights
    out = np.zeros(signal.shape)
    for i, peers in enumerate(_peers(rollout)):
        if len(peers) > 1:
            for k, weight in enumerate(weights):
                mine = rewards[peers, k]
                if np.ptp(mine) > 0:
                    score = (rewards[i, k] - mine.mean()) / (mine.std(ddof=ddof) + eps)
                    out[i, _rows(rollout.mask)[i][-1]] += weight * score
    return out


def whiten(signal, rollout, ddof=1, eps=1e-8, stabiliser="inside"):
    mask = np.asarray(rollout.mask)
    tokens = np.asarray(signal)[mask]
    power = tokens.var(ddof=ddof)
    divisor = {
        "inside": np.sqrt(power + eps),
        "outside": np.sqrt(power) + eps,
        "clamp": np.sqrt(max(power, eps)),
    }
    out = np.zeros(mask.shape)
    out[mask] = (tokens - tokens.mean()) / divisor[stabiliser]
    return out


def clip(signal, rollout, limit, low):
    return np.where(rollout.mask, np.minimum(np.maximum(np.asarray(signal), low), limit), 0.0)


def overlong(signal, rollout, max_tokens, buffer, penalty=1.0, capped=True):
    def amount(length):
        over = length - (max_tokens - buffer)
        steps = min(over, buffer) if capped else over
        return -penalty * steps / buffer if over > 0 else 0.0

    return _on_last(signal, rollout, amount)


def plain_ema_baseline(signals, rollouts, decay):
    """Advantages of a sequence of batches, against an average that starts at 0."""
    baseline, out = 0.0, []
    for signal, rollout in zip(signals, rollouts, strict=True):
        total = _totals(signal, rollout.mask)
        live = [total[i] for i, tokens in enumerate(_rows(rollout.mask)) if tokens]
        out.append(_spread([r - baseline for r in total], np.asarray(rollout.mask)))
        baseline = decay * baseline + (1 - decay) * float(np.mean(live))
    return out
