"""eqrl: composable pieces for reinforcement learning of language models, in JAX and Equinox.

`prompts -> rollout -> reward -> (selection) -> advantage -> loss -> update`. The names here are the
public surface, in that order; `eqrl.algorithms`, `eqrl.presets`, `eqrl.models`, `eqrl.samplers`,
`eqrl.logprobs`, `eqrl.sharding`, `eqrl.rewards`, `eqrl.data`, `eqrl.tracking` and `eqrl.checkpoint`
are namespaces of their own.
"""

from importlib.metadata import version as _version

from . import (
    algorithms as algorithms,
    data as data,
    logprobs as logprobs,
    models as models,
    presets as presets,
    rewards as rewards,
    samplers as samplers,
    sharding as sharding,
    tracking as tracking,
)

# Estimators: signal -> signal.
from ._advantages import (
    adaptive_kl_penalty as adaptive_kl_penalty,
    add_values as add_values,
    as_score as as_score,
    batch_center as batch_center,
    batch_norm as batch_norm,
    clip as clip,
    component as component,
    ema_baseline as ema_baseline,
    gae as gae,
    gae_adaptive as gae_adaptive,
    gdpo as gdpo,
    gpg as gpg,
    group_center as group_center,
    group_norm as group_norm,
    kl_penalty as kl_penalty,
    kl_shaping as kl_shaping,
    length_cost as length_cost,
    length_reward as length_reward,
    max_rl as max_rl,
    opo as opo,
    optimal_token_baseline as optimal_token_baseline,
    overlong as overlong,
    pass_at_k as pass_at_k,
    remax as remax,
    returns as returns,
    rloo as rloo,
    scale as scale,
    shift as shift,
    turn_gae as turn_gae,
    turn_returns as turn_returns,
    whiten as whiten,
)
from ._estimate_pass_at_k import estimate_pass_at_k as estimate_pass_at_k

# Log-probs.
from ._logprobs import Implementation as Implementation, token_logprobs as token_logprobs

# Loss terms, factors, ratios and weightings.
from ._losses import (
    adaptive_entropy as adaptive_entropy,
    binary_kl_mask as binary_kl_mask,
    cispo as cispo,
    cispo_around_one as cispo_around_one,
    clamp_weights as clamp_weights,
    clip_cov as clip_cov,
    clipped as clipped,
    constant_length as constant_length,
    dppo as dppo,
    dro as dro,
    entropy_bonus as entropy_bonus,
    geometric_mask as geometric_mask,
    geometric_ratio as geometric_ratio,
    geometric_token_ratio as geometric_token_ratio,
    gmpo as gmpo,
    icepop as icepop,
    kl as kl,
    kl_cov as kl_cov,
    kl_mask as kl_mask,
    m2po as m2po,
    normalised as normalised,
    opsm as opsm,
    positive_nll as positive_nll,
    reinforce as reinforce,
    sapo as sapo,
    sequence_mask as sequence_mask,
    sequence_mean as sequence_mean,
    sequence_ratio as sequence_ratio,
    sequence_sum as sequence_sum,
    squared_ratio as squared_ratio,
    tis as tis,
    tis_sequence as tis_sequence,
    token_mean as token_mean,
    token_ratio as token_ratio,
    token_sum as token_sum,
    top_entropy as top_entropy,
    unclipped as unclipped,
    value_loss as value_loss,
    vespo as vespo,
)
from ._losses.base import AbstractTerm as AbstractTerm, term as term, weighted as weighted
from ._losses.factor import AbstractFactor as AbstractFactor, factor as factor
from ._losses.ratio import log_ratio as log_ratio, ratio as ratio
from ._losses.weighting import weighting as weighting

# What own pieces are made of.
from ._masked import (
    group_sum as group_sum,
    live_rows as live_rows,
    outcome as outcome,
    row_total as row_total,
    spread as spread,
    zero_unmasked as zero_unmasked,
)
from ._metrics import (
    advantage_metrics as advantage_metrics,
    rollout_metrics as rollout_metrics,
    value_metrics as value_metrics,
)

# Optimizer pieces that optax leaves open.
from ._optimizer import (
    actor_critic as actor_critic,
    float32_state as float32_state,
    matrices as matrices,
    muon as muon,
    warmup_cosine as warmup_cosine,
)
from ._pack import compact as compact, pad_rows as pad_rows
from ._parse import parse as parse

# Prompts.
from ._prompts import Prompts as Prompts, pad_prompts as pad_prompts
from ._refill import refill as refill
from ._score import ANNOTATED as ANNOTATED, annotate as annotate, score as score

# Selection.
from ._select import (
    drop_constant_groups as drop_constant_groups,
    drop_extreme_groups as drop_extreme_groups,
    drop_stale as drop_stale,
    drop_truncated as drop_truncated,
    drop_unstopped as drop_unstopped,
)
from ._select.base import (
    AbstractSelection as AbstractSelection,
    apply as apply,
    selection as selection,
)
from ._transform import AbstractTransform as AbstractTransform, stateless as stateless

# Carriers.
from ._types import Batch as Batch, Rollout as Rollout, Scores as Scores

# Update.
from ._update import (
    TrainState as TrainState,
    init as init,
    minibatches as minibatches,
    pad_batch as pad_batch,
    update as update,
)
from .algorithms import Algorithm as Algorithm


__version__ = _version("eqrl")
