"""Checkpoints: a pytree of arrays and a few JSON facts, whole or not there at all.

`Checkpoints` keeps the training state with Orbax (extra `checkpoint`), which commits a step by
renaming its folder: a kill in mid-save costs the step that was being saved, never an older one.
`resolve_resume` decides what a run continues; `eqrl.models.save` writes weights for others.
"""

from .checkpoints import Checkpoints as Checkpoints
from .resume import Resume as Resume, resolve_resume as resolve_resume
