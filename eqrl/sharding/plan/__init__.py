"""What a run would take on chips that need not be here: compiled for them, and not run.

topology = plan.topology("v6e-8")
mesh = sharding.make_mesh("fsdp=-1", topology.devices)
print(plan.plan_program("update", update, args, topology=topology, mesh=mesh))
"""

from ._gpu import GPU_TARGETS as GPU_TARGETS
from .chips import CHIPS as CHIPS, Chip as Chip
from .collectives import Collective as Collective
from .flops import count_flops as count_flops
from .program import (
    ProgramPlan as ProgramPlan,
    in_turn as in_turn,
    plan_program as plan_program,
)
from .roofline import Seconds as Seconds, roofline as roofline
from .search import search as search
from .topology import Topology as Topology, here as here, topology as topology
from .traffic import Traffic as Traffic, read_traffic as read_traffic
