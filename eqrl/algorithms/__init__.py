"""Named algorithms, as published: each is a few lines of wiring over the public pieces.

Every function returns an `Algorithm`. Print it to see the expressions it is made of; to vary it,
write those expressions yourself. A coefficient of 0 leaves its part out, and with it the forward
pass that the part would have required. What the libraries compute under the same names is in
`eqrl.presets`.
"""

from .actor_critic import (
    ppo as ppo,
    vapo as vapo,
)
from .base import Algorithm as Algorithm
from .group_relative import (
    dapo as dapo,
    dr_grpo as dr_grpo,
    gdpo as gdpo,
    grpo as grpo,
    lite_ppo as lite_ppo,
)
from .policy_gradient import (
    gpg as gpg,
    max_rl as max_rl,
    opo as opo,
    pkpo as pkpo,
    reinforce as reinforce,
    reinforce_pp as reinforce_pp,
    reinforce_pp_baseline as reinforce_pp_baseline,
    remax as remax,
    rloo as rloo,
)
from .surrogates import (
    cispo as cispo,
    clip_cov as clip_cov,
    dppo as dppo,
    gmpo as gmpo,
    gspo as gspo,
    kl_cov as kl_cov,
    luspo as luspo,
    m2po as m2po,
    sapo as sapo,
    vespo as vespo,
)
