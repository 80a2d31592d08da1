"""A baseline that remembers earlier batches."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._checks import check_number
from .._lifted import spell
from .._masked import live_rows, row_total, scalar_mean, spread
from .._transform import AbstractTransform, check_shapes
from .._types import PerToken, Rollout, ScalarLike


class EmaState(eqx.Module):
    """What `ema_baseline` remembers.

    Attributes:
        mean: moving average of batch mean scores; 0 before the first batch.
        count: how many batches it has seen.
    """

    mean: Float[Array, ""]
    count: Int[Array, ""]


class EmaBaseline(AbstractTransform[EmaState]):
    """See `ema_baseline`, which builds it."""

    decay: ScalarLike
    debias: bool = eqx.field(static=True)

    reads_total = True
    spreads = True

    def init(self) -> EmaState:
        return EmaState(jnp.zeros(()), jnp.zeros((), jnp.int32))

    def update(
        self, signal: PerToken, state: EmaState, rollout: Rollout
    ) -> tuple[PerToken, EmaState]:
        check_shapes(signal, rollout)
        total, live = row_total(signal, rollout.mask), live_rows(rollout.mask)
        advantage = spread(total - state.mean.astype(signal.dtype), rollout.mask)
        return advantage, self._remember(scalar_mean(total, live), jnp.any(live), state)

    def _remember(self, mean, seen, state: EmaState) -> EmaState:
        count = state.count + 1
        rate = 1 - self.decay
        if self.debias:
            # (1 - d) / (1 - d^n): the weight of the n-th batch in the bias-corrected average.
            rate = rate / (1 - self.decay ** count.astype(state.mean.dtype))
        moved = state.mean + rate * (mean.astype(state.mean.dtype) - state.mean)
        return EmaState(
            jnp.where(seen, moved, state.mean).astype(state.mean.dtype),
            jnp.where(seen, count, state.count),
        )

    def __repr__(self) -> str:
        return spell(ema_baseline, {"decay": self.decay, "debias": self.debias})


def ema_baseline(decay: ScalarLike = 0.95, *, debias: bool = True) -> EmaBaseline:
    r"""Score minus a moving average of earlier batches' mean scores.

    $A_i = r_i - b$ on every masked token of row $i$, with $b$ the average *before* this batch
    enters it, so that no row is compared with itself. The average weighs the batch seen $k$
    batches ago by $decay^k$, normalised (no pull towards the zero start). With `debias=False` it
    is the plain $b \leftarrow decay \cdot b + (1 - decay) \bar r$ from 0, which stays near 0 for
    the first $1 / (1 - decay)$ batches. The first batch has nothing to be compared with: its
    baseline is 0 and its advantages are its scores. A batch without live rows leaves the state
    alone. Empty rows get 0.

    Differs between libraries: prime-rl's "RAE" is `ema_baseline(debias=False)`, one average a
    role. The paper prints the update before the subtraction, so that the average holds the score
    it is subtracted from; here, as in prime-rl, it does not.

    Args:
        decay: weight of the past, from 0 (the last batch only) to below 1.
        debias: whether to normalise the weights of the batches seen so far.

    Returns:
        A transform with state: call `update`, and keep the state it returns.

    Source: the role-free form of Liu et al. 2025 (SPIRAL, arXiv:2506.24119).
    """
    check_number("decay", decay, least=0, below=1)
    return EmaBaseline(decay, debias)
