"""What a run leaves behind: metrics, curve, samples, and how it ended.

Nothing here knows an algorithm. wandb, rich and matplotlib are imported only when used.
"""

from .averages import StepTimer as StepTimer, throughput as throughput
from .base import Combined as Combined, Tracker as Tracker, combine as combine
from .console import Console as Console
from .curve import draw_curve as draw_curve
from .files import write_atomic as write_atomic, write_json as write_json
from .jsonl import Jsonl as Jsonl, read_jsonl as read_jsonl
from .samples import (
    Sample as Sample,
    print_samples as print_samples,
    write_samples as write_samples,
)
from .status import ExitStatus as ExitStatus, exit_status as exit_status
from .stop import StopRequest as StopRequest
from .version import code_version as code_version
from .wandb import Wandb as Wandb
