"""Rewards: reading numbers, formats, and a scoring loop that no reward function can stop."""

import functools
import importlib
import json
import logging
import random
import re
import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from eqrl.rewards import (
    answer_marker,
    correct,
    extract_number,
    number_after,
    pattern_format,
    reward_format,
    reward_name,
    reward_names,
    score,
    tag_count_reward,
    weighted,
)


LENIENT = [
    # Where the predecessor went wrong.
    ("-5", -5),
    ("1,450", 1450),
    ("<answer>7</answer> I checked it 3 times", 7),
    # Signs.
    ("The change is \u22125 degrees.", -5),
    ("it is -$5.", -5),
    ("it is $-5", -5),
    ("= -12", -12),
    ("(-3)", -3),
    ("3*-5", -5),
    ("16-3", 3),
    ("10 - 5", 5),
    ("10 -5", 5),
    ("a well-known-4", 4),
    ("pages 10\u201315", 15),
    ("- 5 apples", 5),
    # Separators and decimals.
    ("$1,234,567.50 in all", Fraction(2469135, 2)),
    (r"1{,}450", 1450),
    (r"1,\!450", 1450),
    ("1, 2, 3", 3),
    ("1,2,3", 3),
    ("1,4500", 4500),
    ("7.00", 7),
    ("x = 5.", 5),
    (".5", Fraction(1, 2)),
    ("-.25", Fraction(-1, 4)),
    ("Rs.500", 500),
    ("1.5e3", 1500),
    ("2E-2", Fraction(1, 50)),
    ("3 eggs", 3),
    # Fractions.
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("3 / 4", Fraction(3, 4)),
    ("1 1/2 cups", Fraction(3, 2)),
    ("5 10/2", 5),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"-\dfrac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    (r"\frac34", Fraction(3, 4)),
    (r"2\tfrac{1}{2}", Fraction(5, 2)),
    ("8, then 3/0", 8),
    # Units.
    ("50%", 50),
    (r"50\%", 50),
    ("12kg", 12),
    ("\u20ac1,000", 1000),
    (r"\$18 per day", 18),
    # Markers, and which of them counts.
    ("#### 7", 7),
    ("so 7\n#### 7\nThanks, 2024", 7),
    ("#### $1,450", 1450),
    ("#### -7", -7),
    ("#### **7**", 7),
    ("#### 1. First step\nthe rest is 12", 12),
    ("#### Step 3\nthe rest is 12", 12),
    (r"\boxed{7} of 12", 7),
    (r"\boxed{7\text{ apples}} of 12", 7),
    (r"\boxed{\frac{1}{2}} of 12", Fraction(1, 2)),
    (r"\boxed{7} no, \boxed{8} of 12", 8),
    (r"an unclosed \boxed{3", 3),
    ("<answer>7</answer> no, <answer>8</answer>", 8),
    ("<answer>3 + 4 = 7</answer>", 7),
    ("<answer>#### 7</answer> 5", 7),
    ("<answer>9", 9),
    ("<answer></answer> 4", 4),
    ("<answer>6</answer>\n#### 7\n8", 7),
    ("#### 7\n<answer>6</answer>\n8", 6),
    # Nothing to read.
    ("", None),
    ("no idea", None),
    ("\u00b2", None),
    ("9" * 301, None),
    ("1/0", None),
]

STRICT = [
    ("#### 7", 7),
    ("#### -1,450.5", Fraction(-2901, 2)),
    ("####7", 7),
    ("#### $7", 7),
    ("#### 6\n#### 7", 7),
    ("#### 7\nmore 8", 7),
    ("7", None),
    ("<answer>7</answer>", None),
    (r"\boxed{7}", None),
    ("#### about 7", None),
    ("####\n7", None),
    ("#### 1. First", None),
    ("#### 7 #### ", 7),
]

WITHIN = 20.0  # seconds until a test that hangs is called hung; the machine may be busy


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(importlib.import_module("eqrl.rewards.score"), "_warned", set())


@pytest.mark.parametrize(("text", "value"), LENIENT)
def test_extract(text, value):
    assert extract_number(text) == value


@pytest.mark.parametrize(("text", "value"), STRICT)
def test_extract_strict(text, value):
    assert number_after(text) == value


def test_other_marker():
    assert number_after("6 Answer: 7 of 8", "Answer:") == 7
    with pytest.raises(ValueError, match="`marker` is empty"):
        number_after("7", "")


def test_round_trip():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(-(10 ** rng.randint(1, 12)), 10 ** rng.randint(1, 12))
        d = rng.randint(1, 10 ** rng.randint(1, 4))
        decimal = Fraction(n, 1000)
        for text, value in [
            (f"{n}", n),
            (f"{n:,}", n),
            (f"${n:,}.", n),
            (f"{n}/{d}", Fraction(n, d)),
            (rf"\frac{{{n}}}{{{d}}}", Fraction(n, d)),
            (f"{float(decimal):,.3f}", decimal),
            (f"{n}".replace("-", "\u2212"), n),
        ]:
            for wrapped in (text, f"1 <answer>{text}</answer> 2", rf"1 \boxed{{{text}}} 2"):
                assert extract_number(wrapped) == value, wrapped
            assert number_after(f"1\n#### {text}\n2") == value


@pytest.mark.parametrize(
    "text",
    [
        "1" * 100_000,
        "1,111" + ",111" * 100_000 + "1",
        "1{,}" * 25_000,
        r"\frac{1" * 15_000,
        r"\boxed{" * 15_000,
        "####" * 50_000 + " " * 50_000,
        "#### 1." + " " * 100_000,
        "<answer>" * 15_000,
        "1/" * 50_000,
        "1 " * 50_000,
        "1e" * 50_000,
        "-" * 100_000,
        "<think></think><answer>" * 10_000,
    ],
    ids=range(13),
)
def test_adversarial_text_is_fast(text):
    start = time.perf_counter()
    extract_number(text)
    number_after(text)
    reward_format(text, {})
    answer_marker()(text, {})
    tag_count_reward(text, {})
    assert time.perf_counter() - start < WITHIN  # a quadratic pattern takes minutes


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_of_gsm8k(shared, split, count):
    lines = (shared / "data" / "gsm8k" / f"{split}.jsonl").read_text("utf-8").split("\n")
    solutions = [json.loads(line)["answer"] for line in lines if line]
    assert len(solutions) == count
    rewards = (correct(), correct(strict=True), answer_marker())
    for solution in solutions:
        gold = solution.split("####")[-1].strip()
        assert re.fullmatch(r"-?[0-9,]+(\.[0-9]+)?", gold)
        assert extract_number(gold) == Fraction(gold.replace(",", ""))
        example = {"answer": gold}
        assert [reward(solution, example) for reward in rewards] == [1.0, 1.0, 1.0], solution


def test_correct():
    lenient, strict = correct(), correct(strict=True)
    example = {"answer": "1,450"}
    assert lenient("it is 1450", example) == 1.0
    assert lenient("it is 1451", example) == 0.0
    assert lenient("no idea", example) == 0.0
    assert strict("it is 1450", example) == 0.0
    assert strict("#### 1450.0", example) == 1.0
    assert correct(field="gold")("7", {"gold": 7}) == 1.0
    assert lenient("0.333", {"answer": "1/3"}) == 0.0
    assert lenient("0.75", {"answer": r"\frac{6}{8}"}) == 1.0


def test_correct_names_itself():
    assert correct().__name__ == "reward_correct"
    assert correct(strict=True).__name__ == "reward_correct_strict"
    assert repr(correct()) == "correct(field='answer')"
    assert repr(correct(strict=True)) == "correct(field='answer', strict=True, marker='####')"


def test_correct_refuses_records_without_gold():
    with pytest.raises(ValueError, match=r"no field 'answer', only \['gold'\]"):
        correct()("7", {"gold": "7"})
    with pytest.raises(ValueError, match="holds no number"):
        correct()("7", {"answer": "seven"})
    with pytest.raises(ValueError, match="`marker` is empty"):
        correct(strict=True, marker="")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>\n<answer>7</answer>", 1.0),
        ("<think>a\nb</think> <answer>7\n</answer>\n", 1.0),
        ("<think>a</think><answer>7</answer>", 1.0),
        ("<think>a</think>\n<answer>7</answer> and more", 0.0),
        ("<think>a</think>\n<answer>7</answer>\nand more", 0.0),
        ("<think>a</think>\n<answer>7</answer> more</answer>", 0.0),
        ("so <think>a</think>\n<answer>7</answer>", 0.0),
        ("<think>a</think> so <answer>7</answer>", 0.0),
        ("<answer>7</answer>\n<think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
    ],
)
def test_reward_format(text, value):
    assert reward_format(text, {}) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7\n#### 7", 1.0),
        ("#### -1,450.5\n", 1.0),
        ("x\n#### \u2212$7.", 1.0),
        ("x\n#### 3/4", 1.0),
        ("so #### 7", 0.0),
        ("x\n#### 7 apples", 0.0),
        ("x\n#### 7\nmore", 0.0),
        ("#### 6\n#### 7", 0.0),
        ("7", 0.0),
    ],
)
def test_answer_marker(text, value):
    assert answer_marker()(text, {}) == value


def test_pattern_format():
    reward = pattern_format(r"a.b", name="reward_ab")
    assert (reward("a\nb", {}), reward("a\nbc", {})) == (1.0, 0.0)
    assert reward.__name__ == "reward_ab"
    with pytest.raises(ValueError, match="no regular expression"):
        pattern_format("(")


def test_tag_count():
    assert tag_count_reward("<think>a</think>\n<answer>7</answer>", {}) == 1.0
    assert tag_count_reward("<think><think></think>", {}) == 0.25
    assert tag_count_reward("", {}) == 0.0


def test_names():
    class Judge:
        def __call__(self, completion, example):
            return 0.0

    assert reward_name(functools.partial(length, scale=2)) == "length"
    assert reward_names([length, correct(), length, Judge()]) == [
        "length",
        "reward_correct",
        "length_2",
        "Judge",
    ]


def length(completion, example, scale=1):
    return scale * len(completion)


def picky(completion, example):
    if completion == "bad":
        raise RuntimeError("I refuse")
    return 1


def sleeps(completion, example):
    if completion == "bad":
        time.sleep(3600)
    return 2.0


def spins(completion, example):
    while completion == "bad":
        pass
    return 3.0


def shields(completion, example):
    for _ in range(5 * (completion == "bad")):
        try:
            time.sleep(3600)
        except Exception:  # must not catch the deadline
            pass
    return 4.0


SAMPLES = ["ok", "bad", "ok!"]


def score_here(*args, **kwargs):
    return score(*args, **kwargs)


def score_in_thread(*args, **kwargs):
    results = []
    thread = threading.Thread(target=lambda: results.append(score(*args, **kwargs)))
    thread.start()
    thread.join(WITHIN)
    return results[0]


@pytest.mark.parametrize("run", [score_here, score_in_thread])
def test_score(run):
    scored = run([length, picky], SAMPLES, [{}] * 3)
    np.testing.assert_array_equal(scored.components, np.array([[2, 1], [3, 0], [3, 1]], np.float32))
    assert scored.components.dtype == np.float32
    np.testing.assert_array_equal(scored.failed, [False, True, False])
    assert (scored.errors, scored.timeouts) == (1, 0)
    assert scored.first_error == "picky raised RuntimeError: I refuse"


@pytest.mark.parametrize("run", [score_here, score_in_thread])
def test_hanging_functions_cost_their_sample_only(run):
    start = time.perf_counter()
    functions = [sleeps, picky] if run is score_in_thread else [sleeps, spins, shields]
    scored = run(functions, SAMPLES, [{}] * 3, timeout=0.3)
    assert time.perf_counter() - start < WITHIN
    np.testing.assert_array_equal(scored.failed, [False, True, False])
    np.testing.assert_array_equal(scored.components[:, 0], np.array([2, 0, 2], np.float32))
    assert scored.timeouts == (1 if run is score_in_thread else 3)
    assert scored.first_error == "sleeps took longer than 0.3 s"


def test_hanging_regular_expression_is_stopped():
    scored = score([pattern_format(r"(a+)+b")], ["a" * 40, "ab"], [{}] * 2, timeout=0.3)
    np.testing.assert_array_equal(scored.components, np.array([[0], [1]], np.float32))
    assert scored.timeouts == 1


def test_a_swallowed_interrupt_is_repeated():
    def stubborn(completion, example):
        try:
            time.sleep(3600)
        except BaseException:
            time.sleep(3600)

    start = time.perf_counter()
    scored = score([stubborn], ["x"], [{}], timeout=0.2)
    assert time.perf_counter() - start < WITHIN
    assert scored.timeouts == 1


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 1e300, None, "1.0", 1j, np.ones(1), [1.0], 10**400],
    ids=repr,
)
def test_what_is_no_finite_number_is_an_error(value):
    scored = score([lambda completion, example: value], ["x"], [{}])
    assert (scored.errors, scored.timeouts) == (1, 0)
    np.testing.assert_array_equal(scored.components, np.array([[0]], np.float32))
    np.testing.assert_array_equal(scored.failed, [True])


@pytest.mark.parametrize(
    "value", [1, True, np.float32(1), np.bool_(True), Fraction(1), np.ones(())]
)
def test_what_is_a_number(value):
    scored = score([lambda completion, example: value], ["x"], [{}])
    assert scored.errors == 0
    np.testing.assert_array_equal(scored.components, np.array([[1]], np.float32))


def test_own_timeout_error_is_an_error():
    def impatient(completion, example):
        raise TimeoutError("server away")

    scored = score([impatient], ["x"], [{}])
    assert (scored.errors, scored.timeouts) == (1, 0)


def test_one_warning_a_function(caplog):
    with caplog.at_level(logging.WARNING, logger="eqrl"):
        for _ in range(3):
            score([picky], ["bad"] * 5, [{}] * 5)
    assert [record.name for record in caplog.records] == ["eqrl"]
    assert "picky raised RuntimeError: I refuse" in caplog.text


def test_keyboard_interrupt_passes():
    def interrupted(completion, example):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt):
        score([interrupted], ["x"], [{}])
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.fixture
def alarms():
    """The times at which somebody else's SIGALRM handler ran; restored afterwards."""
    rung: list[float] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    yield rung
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, previous)


def test_pending_alarm_goes_off_during_scoring(alarms):
    handler = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    scored = score([sleeps], ["bad"], [{}], timeout=0.5)
    assert scored.timeouts == 1
    assert len(alarms) == 1 and 0.09 < alarms[0] - start < 0.5
    assert signal.getsignal(signal.SIGALRM) is handler


def test_pending_alarm_goes_off_after_scoring(alarms):
    signal.setitimer(signal.ITIMER_REAL, 0.8)
    assert score([sleeps], ["bad"], [{}], timeout=0.1).timeouts == 1
    assert not alarms
    assert 0.0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.75
    time.sleep(1.0)
    assert len(alarms) == 1


def test_error_of_a_pending_alarm_is_not_the_reward_functions():
    def raising(signum, frame):
        raise RuntimeError("the run is over")

    previous = signal.signal(signal.SIGALRM, raising)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(RuntimeError, match="the run is over"):
            score([sleeps], ["bad"], [{}], timeout=WITHIN)
        assert signal.getsignal(signal.SIGALRM) is raising
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def test_nested_scoring():
    def inner(completion, example):
        return float(score([sleeps], ["bad"], [{}], timeout=0.2).timeouts)

    def outer(completion, example):
        return float(score([sleeps], ["bad"], [{}], timeout=WITHIN).timeouts)

    scored = score([inner], ["x"], [{}], timeout=WITHIN)
    np.testing.assert_array_equal(scored.components, np.array([[1]], np.float32))
    scored = score([outer], ["x", "y"], [{}] * 2, timeout=0.3)
    assert scored.timeouts == 2


def test_score_is_cheap():
    start = time.perf_counter()
    score([picky], ["ok"] * 10_000, [{}] * 10_000)
    assert time.perf_counter() - start < 5.0  # measured: 0.1 s


def test_score_refuses():
    with pytest.raises(ValueError, match="`functions` is empty"):
        score([], ["x"], [{}])
    with pytest.raises(ValueError, match="1 completions but 2 examples"):
        score([picky], ["x"], [{}, {}])
    with pytest.raises(ValueError, match="`timeout` is 0"):
        score([picky], ["x"], [{}], timeout=0)


def test_weighted():
    components = np.array([[1, 0, 0.25], [0, 1, 1]], np.float32)
    np.testing.assert_allclose(weighted(components, [1.0, 0.5, -1]), [0.75, -0.5])
    assert weighted(components, [0, 0, 0]).dtype == np.float32
    with pytest.raises(ValueError, match=r"2 `weights` for components of shape \(2, 3\)"):
        weighted(components, [1.0, 0.5])
    with pytest.raises(ValueError, match="give finite numbers"):
        weighted(components, [1.0, 0.5, float("nan")])
