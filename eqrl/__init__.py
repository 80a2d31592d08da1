"""eqrl: composable pieces for reinforcement learning of language models, in JAX and Equinox.

`prompts -> rollout -> reward -> (selection) -> advantage -> loss -> update`. The names here are the
public surface, in that order; `eqrl.algorithms`, `eqrl.models`, `eqrl.samplers`, `eqrl.rewards`,
`eqrl.data`, `eqrl.tracking` and `eqrl.checkpoint` are namespaces of their own.
"""

from importlib.metadata import version as _version

from . import (
    algorithms as algorithms,
    data as data,
    models as models,
    rewards as rewards,
    samplers as samplers,
    tracking as tracking,
)

# Estimators: signal -> signal.
from ._advantages import (
    add_values as add_values,
    batch_center as batch_center,
    batch_norm as batch_norm,
    clip as clip,
    ema_baseline as ema_baseline,
    gae as gae,
    group_center as group_center,
    group_norm as group_norm,
    kl_penalty as kl_penalty,
    overlong as overlong,
    returns as returns,
    rloo as rloo,
    scale as scale,
    shift as shift,
    whiten as whiten,
)

# Log-probs.
from ._logprobs import Implementation as Implementation, token_logprobs as token_logprobs

# Loss terms and weightings.
from ._losses import (
    clipped as clipped,
    constant_length as constant_length,
    entropy_bonus as entropy_bonus,
    kl as kl,
    reinforce as reinforce,
    sequence_mean as sequence_mean,
    sequence_sum as sequence_sum,
    token_mean as token_mean,
    value_loss as value_loss,
)
from ._losses.base import AbstractTerm as AbstractTerm, term as term
from ._masked import outcome as outcome
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
from ._pack import compact as compact
from ._parse import parse as parse
from ._pass_at_k import pass_at_k as pass_at_k

# Prompts.
from ._prompts import Prompts as Prompts, pad_prompts as pad_prompts
from ._refill import refill as refill
from ._score import annotate as annotate, score as score

# Selection.
from ._select import (
    apply as apply,
    drop_constant_groups as drop_constant_groups,
    drop_truncated as drop_truncated,
)
from ._transform import AbstractTransform as AbstractTransform, stateless as stateless

# Carriers.
from ._types import Batch as Batch, Rollout as Rollout, Scores as Scores

# Update.
from ._update import (
    TrainState as TrainState,
    init as init,
    minibatches as minibatches,
    update as update,
)
from .algorithms import Algorithm as Algorithm


__version__ = _version("eqrl")
