"""From reward to advantage: one transform a file. Every public function here is a builder."""

from .add_values import add_values as add_values
from .batch_center import batch_center as batch_center
from .batch_norm import batch_norm as batch_norm
from .clip import clip as clip
from .ema_baseline import ema_baseline as ema_baseline
from .gae import gae as gae
from .group_center import group_center as group_center
from .group_norm import group_norm as group_norm
from .kl_penalty import kl_penalty as kl_penalty
from .overlong import overlong as overlong
from .returns import returns as returns
from .rloo import rloo as rloo
from .scale import scale as scale
from .shift import shift as shift
from .whiten import whiten as whiten
