"""GPG's advantage: the centred score, scaled up by the share of completions that score."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import live_rows, row_total, spread
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre_groups, refuse_singletons


def gpg(f_norm: ScalarLike = 1.0) -> Stateless:
    r"""Score minus group mean, times one factor for the whole batch.

    $A_i = \alpha (r_i - \bar r_g) / f_{norm}$ on every masked token of row $i$, with $\alpha$ the
    number of live rows of the batch over the number of those whose total $r$ is not zero (0 if
    there is none). $\bar r_g$ is over the live rows of the group, row $i$ included. A constant
    group gives exactly 0 in any precision, and so does a group of one (refused where the ids are
    known). Empty rows get 0 and count nowhere.

    Trap: $\alpha$ counts scores that are not zero, as verl does, not advantages that are not
    zero. With 0/1 rewards it is one over the share of right completions; with rewards of -1 and
    1, or after `shift`, `overlong` or `kl_penalty`, hardly any total is zero and $\alpha$ is 1.

    Args:
        f_norm: a constant divisor, above 0.

    Returns:
        A transform from rewards to advantages; the paper's loss is `reinforce()`.

    Source: Chu et al. 2025 (GPG, arXiv:2504.02546).
    """
    check_number("f_norm", f_norm, above=0)
    return stateless(_gpg, builder=gpg, reads_total=True, spreads=True, min_group=2, f_norm=f_norm)


def _gpg(signal: PerToken, rollout: Rollout, *, f_norm: ScalarLike) -> PerToken:
    refuse_singletons(rollout, "gpg()")
    mask = rollout.mask
    centred, _ = centre_groups(signal, mask, rollout.group)
    scoring = jnp.sum(row_total(signal, mask) != 0).astype(signal.dtype)
    # Without any such row every advantage is 0 already.
    alpha = jnp.sum(live_rows(mask)).astype(signal.dtype) / jnp.maximum(scoring, 1)
    return spread(alpha * centred / f_norm, mask)
