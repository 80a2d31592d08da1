"""Many devices: meshes, and what lies where."""

from .batch import BatchPlan as BatchPlan, plan_batch as plan_batch
from .mesh import AXES as AXES, ROWS as ROWS, make_mesh as make_mesh, row_shards as row_shards
from .place import (
    partition_spec as partition_spec,
    place as place,
    place_rows as place_rows,
    shardings as shardings,
)
