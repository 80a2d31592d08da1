"""The baseline of least variance, for every token by itself."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._recurrence import discounted_sum
from ._statistics import refuse_singletons


def optimal_token_baseline(*, cap: ScalarLike | None = 2.0) -> Stateless:
    r"""Return-to-go minus the group's return-to-go, weighed by how random each path has been.

    $A_{it} = G_{it} - b_t$ with $b_t = \sum_j G_{jt} W_{jt} / \sum_j W_{jt}$ over the rows $j$ of
    the group that have a $t$-th masked token, row $i$ included; $t$ counts masked tokens, so gaps
    and padding do not matter. $G$ is undiscounted, and
    $W_{jt} = \sum_{s \le t} (1 - 2\pi_s + \sum_v \pi_v^2) \, w_s^2$: the squared norm of the
    gradient of $\log\pi$ with respect to the logits, added up along the path. $\pi_s$ is the
    probability of the sampled token under `rollout.old_logprobs`, or the sampler's
    `rollout.logprobs` where that is absent.

    $w_s$ is the weight that the objective gives to the mismatch of sampler and trainer:
    $\min(\pi_{old}/\pi_{sampler}, cap)$ where the rollout has `old_logprobs`, else 1. Set `cap` to
    that of the objective's truncated importance weight, and to `None` ($w = 1$) for an objective
    without one. It must be truncated: one token's squared ratio could outweigh its whole group.

    Equal returns give exactly 0 in any precision, and so does a token that no other row of the
    group reaches: the tail of the longest completion, and a group of one (refused where the ids
    are known). Where all paths were certain ($\sum W = 0$) the baseline is the plain mean. Empty
    rows enter no statistic and get 0; truncated rows count like others.

    Differs between libraries: verl gives a lone row its return instead of 0, and by default also
    the tail of the longest completion; it adds 1e-8 to $\sum W$; its single-turn form counts
    columns instead of masked tokens; it weighs with $w$ only if a rollout correction is on.

    Args:
        cap: truncation of the importance weight, above 0; `None` weighs every token by 1.

    Returns:
        A transform from per-token rewards to advantages; requires `rollout.sum_pi_squared`.

    Source: "The Optimal Token Baseline", 2026 (arXiv:2602.07078).
    """
    if cap is not None:
        check_number("cap", cap, above=0)
    return stateless(
        _optimal_token_baseline,
        builder=optimal_token_baseline,
        requires=("sum_pi_squared",),
        reads_total=True,
        spreads=True,
        min_group=2,
        cap=cap,
    )


def _optimal_token_baseline(
    signal: PerToken, rollout: Rollout, *, cap: ScalarLike | None
) -> PerToken:
    refuse_singletons(rollout, "optimal_token_baseline()")
    mask, rows = rollout.mask, rollout.group.astype(jnp.int32)[:, None]
    # Masked tokens are numbered from 0; the others point behind the table and are dropped.
    place = jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, mask.shape[1])
    togo = discounted_sum(signal, mask, 1.0)
    # Relative to one of the group's returns, equal returns give exactly 0.
    relative = zero_unmasked(togo - _highest(togo, rows, place), mask)
    path = jnp.cumsum(_energy(rollout, cap, signal), axis=1)
    weight = jnp.where(_pooled(path, rows, place) > 0, path, jnp.ones_like(path))
    total = jnp.where(mask, _pooled(weight, rows, place), jnp.ones_like(path))
    return zero_unmasked(relative - _pooled(relative * weight, rows, place) / total, mask)


def _energy(rollout: Rollout, cap: ScalarLike | None, like: PerToken) -> PerToken:
    """Squared norm of the score of every masked token's logits; 0 elsewhere."""
    mask, old = rollout.mask, rollout.old_logprobs
    logprobs = zero_unmasked(rollout.logprobs if old is None else old, mask)
    # 1 - 2 p + sum q^2 = (1 - p)^2 + (sum q^2 - p^2): sums of squares, so nothing cancels.
    others = rollout.need("sum_pi_squared") - jnp.exp(2 * logprobs)
    energy = jnp.expm1(logprobs) ** 2 + zero_unmasked(jnp.maximum(others, 0), mask)
    if cap is not None and old is not None:
        drift = zero_unmasked(old - rollout.logprobs, mask)
        energy = energy * jnp.minimum(jnp.exp(drift), cap) ** 2
    return energy.astype(like.dtype)


def _pooled(x: PerToken, rows: Int[Array, "batch 1"], place: Int[Array, "batch time"]) -> PerToken:
    """The sum of `x` over the tokens of the same number in the same group; 0 where unmasked."""
    table = jnp.zeros_like(x).at[rows, place].add(x, mode="drop")
    return table.at[rows, place].get(mode="fill", fill_value=0)


def _highest(x: PerToken, rows: Int[Array, "batch 1"], place: Int[Array, "batch time"]) -> PerToken:
    """The greatest `x` of the same number in the same group; a constant for gradients."""
    x = lax.stop_gradient(x)
    table = jnp.full_like(x, -jnp.inf).at[rows, place].max(x, mode="drop")
    return table.at[rows, place].get(mode="fill", fill_value=0)
