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
        total: the weighted reward of each row, as trained on; `group/zero_std_frac` counts the
            groups in which it is constant.
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
    found |= _groups(total[live], rewards[:, 0], np.asarray(rollout.group)[live])
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


def _groups(total: np.ndarray, first: np.ndarray, group: np.ndarray) -> dict[str, float]:
    low, high = _bounds(total, group)
    worst, best = _bounds(first, group)
    return {
        "group/zero_std_frac": float((low == high).mean()),
        "group/all_zero_frac": float((best <= 0).mean()),
        "group/all_one_frac": float((worst >= 1).mean()),
    }


def _bounds(x: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value of each group."""
    ids, index = np.unique(group, return_inverse=True)
    low, high = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
    np.minimum.at(low, index, x)
    np.maximum.at(high, index, x)
    return low, high


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


def value_metrics(values, targets, mask) -> dict[str, float]:
    """How well the critic knew the returns before it saw them.

    Args:
        values: `[batch time]`, predictions at sampling time.
        targets: `[batch time]`, value targets.
        mask: `[batch time]`; unmasked positions count nowhere.

    Returns:
        `value/mean`, `value/target_mean`, and `value/explained_variance` =
        1 - Var(target - value) / Var(target) over the tokens of the whole batch; 0 where targets
        do not vary.
    """
    chosen = np.asarray(mask)
    value, target = np.asarray(values)[chosen], np.asarray(targets)[chosen]
    if not value.size:
        return {}
    spread = float(target.var())
    explained = 1 - float((target - value).var()) / spread if spread > 0 else 0.0
    return {
        "value/mean": float(value.mean()),
        "value/target_mean": float(target.mean()),
        "value/explained_variance": explained,
    }
