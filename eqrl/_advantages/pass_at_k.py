"""The advantage whose gradient raises the best of k samples instead of the average one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._checks import check_number
from .._masked import group_sum, live_rows, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerRow, PerToken, Rollout, ScalarLike
from ._statistics import (
    centre_within,
    over_deviation,
    refuse_singletons,
    scan_within,
    sort_groups,
    unsort,
    variance,
)


def pass_at_k(k: ScalarLike, *, eps: ScalarLike | None = None) -> Stateless:
    r"""What a completion adds to the best of k completions, averaged over their choice.

    $A_i = \frac{1}{\binom{n-1}{k-1}} \sum_{S \ni i} (\max_S r - \max_{S \setminus i} r)$ on every
    masked token of row $i$; $S$ runs over the subsets of size k of the group's n live rows that
    contain $i$, and $r$ is any real score. With the group's scores in ascending order, and ties
    in any,
    $A_i = \sum_{m=2}^{i} (r_m - r_{m-1}) \binom{m-1}{k-1} / \binom{n-1}{k-1}$: a sum of terms that
    are not negative, so nothing cancels.

    What is unbiased: for independent samples and each $S$, the score function times
    $\max_S r - \max_{S \setminus i} r$, summed over $i \in S$, has mean $\nabla E[\max_S r]$,
    because $\max_{S \setminus i} r$ does not depend on sample $i$. There are $\binom{n}{k} =
    \frac{n}{k} \binom{n-1}{k-1}$ subsets, hence
    $E[\frac{1}{n} \sum_i A_i \nabla\log\pi(y_i)] = \frac{1}{k} \nabla E[\max \text{ of } k]$, where
    the right side is pass@k for 0/1 rewards. `k * pass_at_k(k)` has the mean gradient itself, and
    $\frac{k}{n} A_i$ is the transformed reward as the paper prints it.

    No advantage is negative, and the worst of a group gets 0. A constant group gives exactly 0 in
    any precision, and so does a group of one (refused where the ids are known). In a group of
    fewer than k live rows, k is their number. Empty rows get 0.

    Differs between libraries: verl's "GRPO_PASSK" is k = n: the best row gets its lead over the
    second best, all others 0; with its normalisation, `eps=1e-6`.

    Args:
        k: how many samples the best is taken of, at least 2; for 1 use `rloo()`.
        eps: divides by the group's standard deviation of scores (n - 1) plus `eps`, not negative;
            `None` does not divide.

    Returns:
        A transform from rewards to advantages.

    Source: Walder and Karkhanis 2025 (PKPO, arXiv:2505.15201), leave one out minus one;
    k = n: Tang et al. 2025 (arXiv:2503.19595).
    """
    check_number("k", k)
    if not isinstance(k, jax.Array) and (k < 2 or k != int(k)):
        raise ValueError(f"k={k!r} is no size of a choice; pass an integer from 2 on, or `rloo()`")
    if eps is not None:
        check_number("eps", eps, least=0)
    return stateless(
        _pass_at_k,
        builder=pass_at_k,
        reads_total=True,
        spreads=True,
        min_group=2 if isinstance(k, jax.Array) else int(k),
        k=k,
        eps=eps,
    )


def _pass_at_k(
    signal: PerToken, rollout: Rollout, *, k: ScalarLike, eps: ScalarLike | None
) -> PerToken:
    refuse_singletons(rollout, "pass_at_k()")
    mask, group = rollout.mask, rollout.group
    total, live = row_total(signal, mask), live_rows(mask)
    gain = _gain(total, live, group, jnp.asarray(k, signal.dtype))
    if eps is not None:
        centred, count = centre_within(total, live, group)
        gain = over_deviation(gain, variance(group_sum(centred**2, group), count, 1), eps)
    return spread(gain, mask)


@jax.jit  # Outside `jit` this would run as many separate programs.
def _gain(
    total: PerRow, live: Bool[Array, " batch"], group: Int[Array, " batch"], k: ScalarLike
) -> PerRow:
    order, ahead, behind = sort_groups(live, group, total)
    rank = (ahead + 1).astype(total.dtype)
    # C(m-1, k-1) / C(n-1, k-1) is the product over l = m .. n-1 of (l - k + 1) / l: no factor is
    # larger than 1, and with l = k - 1 among them the product is exactly 0. Cut off at 0, the
    # factors of a k above n are those of k = n.
    factor = jnp.where(behind > 0, jnp.maximum(rank - k + 1, 0) / rank, jnp.ones_like(rank))
    chance = scan_within(jnp.multiply, factor, behind, reverse=True)
    score = total[order]
    step = jnp.where(ahead > 0, score - jnp.roll(score, 1), jnp.zeros_like(score))
    gain = scan_within(jnp.add, step * chance, ahead)
    return jnp.where(live, unsort(gain, order), jnp.zeros_like(total))
