"""What other libraries compute under a name: `presets.verl.grpo()`, `presets.trl.rloo()`, ...

`eqrl.algorithms` follows the papers; these follow the libraries' defaults, as read in August 2026,
where the same name means another estimator, clip, divergence or denominator. Each docstring says
how it differs from the paper's. What depends on micro-batches or processes there (TRL's "bnpo",
per-process whitening, covariance statistics per micro-batch) does not here.
"""

from . import (
    openrlhf as openrlhf,
    predecessor as predecessor,
    trl as trl,
    tunix as tunix,
    verl as verl,
)
