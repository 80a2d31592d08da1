"""What a rollout looks like, in numbers; exact over the batch, computed on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped

from ._types import Rollout


def rollout_metrics(
    rollout: Rollout, total: Float[np.ndarray, " batch"], names: Sequence[str]
) -> dict[str, float]:
    """Rewards, groups and lengths of a rollout. Empty rows count nowhere.

    Args:
        rollout: with `rewards`, the raw components.
        total: the weighted reward of each row, as trained on.
        names: one name a component. `group/all_zero_frac` and `group/all_one_frac` look at the
            first of them, by convention correctness.

    Returns:
        `reward/*`, `group/*`, `completion/*` and the predecessor-style `train-reward/*`,
        `train-seq_len/*`. Component means are unweighted.
    """
    mask = np.asarray(rollout.mask)
    live = mask.any(axis=1)
    if not live.any():
        return {"completion/rows": 0.0}
    rewards = np.asarray(rollout.need("rewards"))[live]
    found = _summary("reward", total[live]) | _summary("train-reward/total", total[live])
    for name, column in zip(names, rewards.T, strict=True):
        found[f"reward/{name}/mean"] = float(column.mean())
        found[f"train-reward/func/{name}/mean"] = float(column.mean())
    found |= _groups(rewards, np.asarray(rollout.group)[live])
    real = (np.asarray(rollout.positions) >= 0).sum(axis=1)[live]
    length = mask.sum(axis=1)[live]
    return found | _lengths(length, real, np.asarray(rollout.truncated)[live])


def _summary(prefix: str, x: Shaped[np.ndarray, " n"]) -> dict[str, float]:
    return {
        f"{prefix}/mean": float(x.mean()),
        f"{prefix}/std": float(x.std()),
        f"{prefix}/min": float(x.min()),
        f"{prefix}/max": float(x.max()),
    }


def _groups(rewards: np.ndarray, group: np.ndarray) -> dict[str, float]:
    ids, index = np.unique(group, return_inverse=True)
    low = np.full((len(ids), rewards.shape[1]), np.inf)
    high = -low
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    constant = (low == high).all(axis=1)
    return {
        "group/zero_std_frac": float(constant.mean()),
        "group/all_zero_frac": float((high[:, 0] <= 0).mean()),
        "group/all_one_frac": float((low[:, 0] >= 1).mean()),
    }


def _lengths(length: np.ndarray, real: np.ndarray, truncated: np.ndarray) -> dict[str, float]:
    found = {
        "completion/rows": float(len(length)),
        "completion/len_mean": float(length.mean()),
        "completion/len_max": float(length.max()),
        "completion/truncated_frac": float(truncated.mean()),
    }
    if not truncated.all():
        found["completion/terminated_len_mean"] = float(length[~truncated].mean())
    for name, x in (("prompt", real - length), ("completion", length), ("total", real)):
        found[f"train-seq_len/{name}/mean"] = float(x.mean())
        found[f"train-seq_len/{name}/max"] = float(x.max())
    return found


def advantage_metrics(advantages, mask) -> dict[str, float]:
    """Token statistics of the advantages: `adv/*`, and `train-reward/advantage/*`.

    Args:
        advantages: `[batch time]`.
        mask: `[batch time]`; unmasked positions count nowhere.
    """
    x = np.asarray(advantages)[np.asarray(mask)]
    if not x.size:
        return {}
    found = _summary("train-reward/advantage", x)
    found |= {"adv/mean": found["train-reward/advantage/mean"], "adv/std": float(x.std())}
    return found | {"adv/abs_max": float(np.abs(x).max())}
