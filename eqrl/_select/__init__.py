"""Which completions train: one selection a file. Every public function here is a builder."""

from .drop_constant_groups import drop_constant_groups as drop_constant_groups
from .drop_extreme_groups import drop_extreme_groups as drop_extreme_groups
from .drop_stale import drop_stale as drop_stale
from .drop_truncated import drop_truncated as drop_truncated
from .drop_unstopped import drop_unstopped as drop_unstopped
