"""A KL cost that steers itself towards a target divergence."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_choice, check_number
from .._kl import KL_ESTIMATORS, kl_estimate
from .._lifted import spell
from .._masked import live_rows, row_length, row_total, scalar_mean, zero_unmasked
from .._transform import AbstractTransform, check_shapes
from .._types import Mask, PerToken, Rollout, ScalarLike
from .kl_penalty import reference_gap


class KlState(eqx.Module):
    """What `adaptive_kl_penalty` remembers.

    Attributes:
        coef: cost per nat that the next batch will bear; float32.
    """

    coef: Float[Array, ""]


class AdaptiveKlPenalty(AbstractTransform[KlState]):
    """See `adaptive_kl_penalty`, which builds it."""

    coef: ScalarLike
    target: ScalarLike
    horizon: ScalarLike
    estimator: str = eqx.field(static=True)

    requires = frozenset({"ref_logprobs"})

    def init(self) -> KlState:
        return KlState(jnp.asarray(self.coef, jnp.float32))

    def update(
        self, signal: PerToken, state: KlState, rollout: Rollout
    ) -> tuple[PerToken, KlState]:
        check_shapes(signal, rollout)
        mask = rollout.mask
        estimate = kl_estimate(reference_gap(rollout, signal.dtype), self.estimator)
        cost = state.coef.astype(signal.dtype) * estimate
        return zero_unmasked(signal - cost, mask), self._steer(estimate, mask, state)

    def _steer(self, estimate: PerToken, mask: Mask, state: KlState) -> KlState:
        live = live_rows(mask)
        length = jnp.maximum(row_length(mask).astype(estimate.dtype), 1)
        kl = scalar_mean(row_total(estimate, mask) / length, live).astype(jnp.float32)
        target, horizon = (jnp.asarray(x, jnp.float32) for x in (self.target, self.horizon))
        error = jnp.clip(kl / target - 1, -0.2, 0.2)
        # Without live rows the sum is 0 and the coefficient stays as it is.
        return KlState(state.coef * (1 + error * jnp.sum(live).astype(jnp.float32) / horizon))

    def __repr__(self) -> str:
        names = ("coef", "target", "horizon", "estimator")
        return spell(adaptive_kl_penalty, {name: getattr(self, name) for name in names})


def adaptive_kl_penalty(
    coef: ScalarLike = 0.001,
    *,
    target: ScalarLike = 0.1,
    horizon: ScalarLike = 10_000,
    estimator: str = "k1",
) -> AdaptiveKlPenalty:
    r"""`kl_penalty` whose coefficient follows the measured divergence.

    $R_t \leftarrow R_t - c \cdot k_t$ with $k_t$ as in `kl_penalty`, and after each batch
    $c \leftarrow c \cdot (1 + \mathrm{clip}(KL/target - 1, -0.2, 0.2) \cdot n / horizon)$. $KL$ is
    the mean over live rows of each row's *mean* estimate per token, $n$ the number of live rows.
    A batch bears the coefficient as it was *before* its own update; one without live rows leaves
    it alone. Unmasked positions and empty rows get 0; truncated rows count like others. Nothing is
    clamped but the error.

    Differs between libraries: this is verl's measure, in nats per token, and its defaults; the
    paper, and TRL's old PPO, compare the *sum* over the completion with a target of some 6 nats.
    verl's $n$ and mean also count empty rows.

    Args:
        coef: cost per nat of the first batch, not negative; at 0 it stays 0.
        target: divergence to hold, nats per token, above 0.
        horizon: how many rows a correction takes, above 0. Keep it well above a fifth of the rows
            of one batch, or that batch alone could turn the coefficient negative.
        estimator: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        A transform with state: call `update`, and keep the state it returns. Requires
        `rollout.ref_logprobs`.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """
    check_number("coef", coef, least=0)
    check_number("target", target, above=0)
    check_number("horizon", horizon, above=0)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    return AdaptiveKlPenalty(coef, target, horizon, estimator)
