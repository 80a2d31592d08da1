"""Loss terms and weightings. Every public function here is a builder."""

from .clipped import clipped as clipped
from .entropy_bonus import entropy_bonus as entropy_bonus
from .kl import kl as kl
from .reinforce import reinforce as reinforce
from .value_loss import value_loss as value_loss
from .weighting import (
    constant_length as constant_length,
    sequence_mean as sequence_mean,
    sequence_sum as sequence_sum,
    token_mean as token_mean,
)
