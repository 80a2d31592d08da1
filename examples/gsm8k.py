"""Post-train a language model on grade-school mathematics.

    python examples/gsm8k.py --algo.name reinforce++
    python examples/gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct --data.path openai/gsm8k

The first command needs no network: it trains the tiny demo model beside this file on generated
word problems in GSM8K's answer format, in minutes on a laptop. The second trains a real model on
the real data. Everything a run writes lies in its run folder; `--help` lists every choice, and
`--print-config` shows what would run without running it.
"""

import sys

from config import Config
from task import Task
from training import main
from word_problems import problems

from eqrl import data, rewards


SYSTEM = (
    "Solve the problem step by step. End with a line that holds #### and the final number, "
    "for example: #### 42"
)


def record(raw: dict) -> dict:
    """A GSM8K record with its gold answer as a plain string."""
    if "question" not in raw or "####" not in str(raw.get("answer", "")):
        raise ValueError(
            "--data.path: every record needs `question` and an `answer` that ends in #### and the "
            "number; convert the data to GSM8K's format"
        )
    return raw | {"answer": raw["answer"].rpartition("####")[2].strip(), "solution": raw["answer"]}


def load(config: Config) -> tuple[list[dict], list[dict]]:
    """Training and held-out records."""
    if config.data.path == "demo":
        return problems("train", 4096), problems("held_out", 512)
    splits = (config.data.split, config.data.eval_split or "test")
    return tuple(  # pyright: ignore[reportReturnType]
        [record(raw) for raw in data.load_records(config.data.path, split)] for split in splits
    )


def build(config: Config) -> Task:
    """Right answers earn 1, a well-formed last line half of that; tags are there to be weighted."""
    if config.model == config.data.path == "demo":
        print(
            "demo: a tiny model on generated word problems; for a real one, "
            "--model Qwen/Qwen2.5-0.5B-Instruct --data.path openai/gsm8k"
        )
    train_records, held_out = load(config)
    return Task(
        name="word problems" if config.data.path == "demo" else "GSM8K",
        train=train_records,
        held_out=held_out,
        rewards=(rewards.correct(), rewards.answer_marker(), rewards.tag_count_reward),
        weights=(1.0, 0.5, 0.0),
        strict=rewards.correct(strict=True),
        lenient=rewards.correct(),
        system=None if config.model == "demo" else SYSTEM,
    )


if __name__ == "__main__":
    sys.exit(main(build))
