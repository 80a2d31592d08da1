"""Many devices and processes: meshes, what lies where, and the numbers of a batch."""

from ..models import ROWS as ROWS
from . import plan as plan
from .arrays import row_part as row_part, to_global as to_global, to_host as to_host
from .batch import BatchPlan as BatchPlan, plan_batch as plan_batch
from .choose import MeshChoice as MeshChoice, mesh_choices as mesh_choices
from .create import create as create
from .mesh import AXES as AXES, make_mesh as make_mesh, row_shards as row_shards
from .place import (
    abstract as abstract,
    device_bytes as device_bytes,
    partition_spec as partition_spec,
    place as place,
    place_rows as place_rows,
    placement as placement,
    shardings as shardings,
)
from .processes import (
    Processes as Processes,
    is_first as is_first,
    own_prompts as own_prompts,
    start as start,
    together as together,
)
from .reshard import reshard as reshard, resharding as resharding
