"""The demo's problems, tokenizer and starting checkpoint."""

import json
import random
import re
import string
import sys
from pathlib import Path

import numpy as np
import pytest


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
DEMO = EXAMPLES / "demo_model"

from word_problems import (  # noqa: E402
    NAMES,
    TEMPLATES,
    THINGS,
    Problem,
    draw,
    draw_many,
    problems,
    work,
)


SPLITS = ("train", "validation", "held_out")
STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DEMO)


def test_problems_are_a_function_of_their_arguments():
    assert problems("train", 50) == problems("train", 50) == problems("train", 80)[:50]
    assert problems("train", 50) != problems("train", 50, seed=1)
    # Pinned: another Python or another edit must not silently change what the demo trains on.
    assert problems("train", 1)[0]["question"] == (
        "Kim has 8 bags of 2 apples, sells 11 and finds 3. How many are there now?"
    )


def test_splits_never_share_a_sum():
    keys = {name: {record["key"] for record in problems(name, 600)} for name in SPLITS}
    assert all(len(found) > 250 for found in keys.values())
    for one, other in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert not keys[one] & keys[other]


def test_the_split_ignores_names():
    problem = draw(random.Random(0))
    renamed = Problem(problem.template, problem.numbers, "Zoe", "Yan", "kites")
    assert renamed.question != problem.question
    assert (renamed.key, renamed.split) == (problem.key, problem.split)


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_comes_twice(split):
    questions = [record["question"] for record in problems(split, 600)]
    assert len(set(questions)) == 600


def test_asking_for_more_problems_than_exist_is_refused():
    with pytest.raises(ValueError, match="n must be smaller"):
        draw_many("no such split", 3)  # type: ignore[arg-type]


def test_every_written_step_is_right_and_the_last_is_the_answer():
    for record in problems("train", 1000) + problems("held_out", 300):
        reasoning, _, marked = record["solution"].partition("\n#### ")
        steps = STEP.findall(reasoning)
        assert 1 <= len(steps) <= 3 and reasoning.count("=") == len(steps)
        for left, operator, right, result in steps:
            exact = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[operator]
            assert exact == int(result) and 0 < exact <= 60
        assert marked == record["answer"] == steps[-1][-1]


def test_steps_use_the_numbers_of_the_question_or_earlier_results():
    for record in problems("train", 1000):
        asked = re.findall(r"\d+", record["question"])
        known, steps = set(asked), STEP.findall(record["solution"])
        for left, _, right, result in steps:
            assert {left, right} <= known
            known.add(result)
        used = {number for left, _, right, _ in steps for number in (left, right)}
        assert set(asked) <= used


# What the stories mean, written a second time without steps.
MEANING = {
    "more": lambda a, b: a + b,
    "fewer": lambda a, b: a - b,
    "each": lambda a, b: a * b,
    "bags_more": lambda a, b, c: a * b + c,
    "bags_lost": lambda a, b, c: a * b - c,
    "find_lose": lambda a, b, c: a + b - c,
    "both_more": lambda a, b: 2 * a + b,
    "both_fewer": lambda a, b: 2 * a - b,
    "both_times": lambda a, b: a + a * b,
    "broken": lambda a, b, c: (a - b) * c,
    "days": lambda a, b, c: (a + b) * c,
    "two_kinds": lambda a, b, c, d: a * b + c * d,
    "sell_find": lambda a, b, c, d: a * b - c + d,
    "both_find": lambda a, b, c: 2 * a - b + c,
}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_answers_mean_what_the_story_says(template):
    found = [p for p in draw_many("train", 1500) if p.template == template]
    assert len(found) > 30
    for problem in found:
        # Numbers in the order the question names them.
        assert tuple(map(int, re.findall(r"\d+", problem.question))) == problem.numbers
        assert int(problem.record()["answer"]) == MEANING[template.name](*problem.numbers)


def test_an_error_in_a_step_is_carried_on():
    template = next(t for t in TEMPLATES if t.name == "bags_more")
    assert work(template.steps, (3, 4, 5), {0: 1}) == [(3, "*", 4, 13), (13, "+", 5, 18)]


def test_tokenizer_round_trips_any_text(tokenizer):
    texts = [
        string.printable,
        "".join(map(chr, range(128))),
        " 12345 ####7\n\n  é 漢 \t<|im_end|> x",
    ]
    texts += [record["question"] + "\n" + record["solution"] for record in problems("train", 100)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id is None


def test_words_and_numbers_are_one_token_each(tokenizer):
    for word in [f" {n}" for n in range(100)] + [f" {w}" for w in NAMES + THINGS] + ["####"]:
        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_questions_and_solutions_are_short(tokenizer):
    for record in problems("train", 500) + problems("held_out", 200):
        chat = [{"role": "user", "content": record["question"]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert len(tokenizer(record["question"])["input_ids"]) <= 28
        assert len(tokenizer(text)["input_ids"]) <= 40
        assert len(tokenizer(record["solution"])["input_ids"]) + 1 <= 32


def test_chat_template_stops_where_the_assistant_begins(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_demo_folder_is_small_and_says_what_it_is():
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 4_500_000


def test_demo_model_is_unfinished(tokenizer):
    """Greedy held-out accuracy stands in the band the docstring of `make_demo_model` states."""
    from eqrl.models import load

    make = pytest.importorskip("make_demo_model")
    loaded = load(DEMO)
    assert loaded.stop_ids == (tokenizer.eos_token_id,)
    records = problems("held_out", 64)
    strict, lenient = make.measure(loaded.model, tokenizer, records, samples=1, temperature=0.0)
    assert 0.25 <= np.mean(strict) <= 0.55
    assert np.mean(strict) <= np.mean(lenient) <= 0.7
