"""What several algorithms put before their baseline."""

from .._advantages import kl_penalty
from .._checks import check_number
from .._transform import AbstractTransform


def penalised(kl: float, rest: AbstractTransform) -> AbstractTransform:
    """`kl_penalty(kl) | rest`, or `rest` alone for a coefficient of 0."""
    check_number("kl", kl, least=0)
    return kl_penalty(kl) | rest if kl else rest
