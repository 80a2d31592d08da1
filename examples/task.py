"""What a script trains on: problems, what a completion earns, and when it is right."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eqrl.rewards import Reward
from eqrl.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything `training.train` needs to know of a data set.

    Attributes:
        name: stands above tables and curves.
        train: records to train on, each with `question` and `answer` and whatever rewards read;
            a field `key` says when two problems are the same (the question does otherwise).
        held_out: records to evaluate on; none of them in `train`.
        rewards: what a completion earns; by convention the first says whether it is right.
        weights: of the rewards in the training signal; metrics are never weighted.
        strict: 1.0 for a right answer in the form that was asked for.
        lenient: 1.0 for a right answer in any form.
        system: system message of every prompt; `None` for none.
        around: from the run's sampler and tokenizer to the one that the task wants, for instance
            one whose completions call tools; `None` for the run's own.
    """

    name: str
    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    strict: Reward
    lenient: Reward
    system: str | None = None
    around: Callable[[Sampler, Any], Sampler] | None = None
