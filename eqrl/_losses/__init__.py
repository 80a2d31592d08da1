"""Loss terms, factors, ratios and weightings. Every public function here is a builder."""

from .adaptive_entropy import adaptive_entropy as adaptive_entropy
from .binary_kl_mask import binary_kl_mask as binary_kl_mask
from .cispo import cispo as cispo, cispo_around_one as cispo_around_one
from .clamp_weights import clamp_weights as clamp_weights
from .clip_cov import clip_cov as clip_cov
from .clipped import clipped as clipped
from .dppo import dppo as dppo
from .dro import dro as dro
from .entropy_bonus import entropy_bonus as entropy_bonus
from .geometric_mask import geometric_mask as geometric_mask
from .gmpo import gmpo as gmpo
from .icepop import icepop as icepop
from .kl import kl as kl
from .kl_cov import kl_cov as kl_cov
from .kl_mask import kl_mask as kl_mask
from .m2po import m2po as m2po
from .normalised import normalised as normalised
from .opsm import opsm as opsm
from .positive_nll import positive_nll as positive_nll
from .ratio import (
    geometric_ratio as geometric_ratio,
    geometric_token_ratio as geometric_token_ratio,
    sequence_ratio as sequence_ratio,
    token_ratio as token_ratio,
)
from .reinforce import reinforce as reinforce
from .sapo import sapo as sapo
from .sequence_mask import sequence_mask as sequence_mask
from .squared_ratio import squared_ratio as squared_ratio
from .tis import tis as tis
from .tis_sequence import tis_sequence as tis_sequence
from .top_entropy import top_entropy as top_entropy
from .unclipped import unclipped as unclipped
from .value_loss import value_loss as value_loss
from .vespo import vespo as vespo
from .weighting import (
    constant_length as constant_length,
    sequence_mean as sequence_mean,
    sequence_sum as sequence_sum,
    token_mean as token_mean,
    token_sum as token_sum,
)
