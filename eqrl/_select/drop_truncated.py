"""Overlong filtering: completions that were cut off."""

from jaxtyping import Array, Bool

from .._masked import live_rows
from .._types import Rollout
from .base import Selection, selection


def drop_truncated() -> Selection:
    """Drops completions that ended without a stop token ("overlong filtering").

    Differs between libraries: as an algorithm's selection, dropped rows do not enter their group's
    statistics either; TRL's `mask_truncated_completions` lets them, which is
    `drop_truncated() * clipped()`.

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476), section 3.4.
    """
    return selection(_drop_truncated, builder=drop_truncated)


def _drop_truncated(rollout: Rollout) -> Bool[Array, " batch"]:
    return live_rows(rollout.mask) & ~rollout.truncated
