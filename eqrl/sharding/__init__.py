"""Many devices and processes: meshes, what lies where, and the numbers of a batch."""

from .arrays import row_part as row_part, to_global as to_global, to_host as to_host
from .batch import BatchPlan as BatchPlan, plan_batch as plan_batch
from .mesh import AXES as AXES, ROWS as ROWS, make_mesh as make_mesh, row_shards as row_shards
from .place import (
    partition_spec as partition_spec,
    place as place,
    place_rows as place_rows,
    shardings as shardings,
)
from .processes import (
    Processes as Processes,
    is_first as is_first,
    own_prompts as own_prompts,
    start as start,
    together as together,
)
