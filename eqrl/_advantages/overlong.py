"""DAPO's soft penalty for completions that come close to the length limit."""

import jax.numpy as jnp

from .._checks import check_number
from .._masked import on_last, row_length, zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike


def overlong(
    max_tokens: ScalarLike, buffer: ScalarLike, *, penalty: ScalarLike = 1.0, capped: bool = True
) -> Stateless:
    r"""Linear penalty over the last `buffer` tokens before `max_tokens`.

    With $L$ the number of masked tokens of the row, the reward on its last masked token changes
    by $-penalty \cdot \mathrm{clip}((L - (max\_tokens - buffer)) / buffer, 0, 1)$: nothing up to
    `max_tokens - buffer`, the whole penalty at `max_tokens` and beyond. With `capped=False` the
    ramp goes on beyond `max_tokens`: $-penalty \cdot \max(\cdot, 0)$. Lengths are in tokens, the
    stop token included. Empty rows stay 0.

    Differs between libraries: TRL and OpenRLHF cap the penalty, verl and AReaL do not; equal as
    long as no completion is longer than `max_tokens`.

    Args:
        max_tokens: completion length at which the penalty is complete.
        buffer: width of the ramp in tokens, above 0 and at most `max_tokens`.
        penalty: what a completion of `max_tokens` loses, not negative.
        capped: whether longer ones lose no more than that.

    Returns:
        A transform from rewards to rewards; it must stand before the signal is spread.

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476), equation 13.
    """
    check_number("max_tokens", max_tokens, least=1)
    check_number("buffer", buffer, above=0)
    check_number("penalty", penalty, least=0)
    if isinstance(max_tokens, int | float):
        check_number("buffer", buffer, most=max_tokens)
    return stateless(
        _overlong,
        builder=overlong,
        reads_total=True,
        max_tokens=max_tokens,
        buffer=buffer,
        penalty=penalty,
        capped=capped,
    )


def _overlong(
    signal: PerToken,
    rollout: Rollout,
    *,
    max_tokens: ScalarLike,
    buffer: ScalarLike,
    penalty: ScalarLike,
    capped: bool,
) -> PerToken:
    length = row_length(rollout.mask).astype(signal.dtype)
    ramp = jnp.clip((length - (max_tokens - buffer)) / buffer, 0, 1 if capped else None)
    return zero_unmasked(signal, rollout.mask) - on_last(penalty * ramp, rollout.mask)
