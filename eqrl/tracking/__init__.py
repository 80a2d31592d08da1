"""What a run leaves behind: metrics, curve, samples, and how it ended.

Nothing here knows an algorithm. wandb, rich and matplotlib are imported only when used.
"""

from .averages import StepTimer as StepTimer
from .averages import throughput as throughput
from .base import Combined as Combined
from .base import Tracker as Tracker
from .base import combine as combine
from .console import Console as Console
from .curve import draw_curve as draw_curve
from .files import write_atomic as write_atomic
from .files import write_json as write_json
from .jsonl import Jsonl as Jsonl
from .jsonl import read_jsonl as read_jsonl
from .samples import (
    Sample as Sample,
)
from .samples import (
    print_samples as print_samples,
)
from .samples import (
    write_samples as write_samples,
)
from .status import ExitStatus as ExitStatus
from .status import exit_status as exit_status
from .stop import StopRequest as StopRequest
from .version import code_version as code_version
from .wandb import Wandb as Wandb
