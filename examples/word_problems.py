"""Generated grade-school word problems in GSM8K's answer format, for runs without a network.

    >>> problems("train", 1)[0]["question"]
    'Kim has 8 bags of 2 apples, sells 11 and finds 3. How many are there now?'

A problem is a *template* (a story and one to three arithmetic steps) filled with numbers, names
and a thing to count. Every number in a question, a step or an answer is a whole number from 1 to
60, so that a tiny model can learn the arithmetic by heart. The reference solution writes one step
after the other and ends with `#### answer`.

Train, validation and held-out problems never overlap, by construction: the split of a problem is
a hash of its template and numbers (`Problem.key`), names and things left out, so the same sum
told of another child always stays on the same side.
"""

import dataclasses
import hashlib
import random
from typing import Literal, TypeAlias


Split: TypeAlias = Literal["train", "validation", "held_out"]
# `(left, operator, right)`; operands are letters: a-d the numbers of the question, x and y the
# results of the first and the second step.
Step: TypeAlias = tuple[str, str, str]

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "beads", "pens", "shells", "stamps", "toys")
WORDS = ("First", "Then", "Last")


@dataclasses.dataclass(frozen=True)
class Template:
    """A story with holes, and the steps that solve it."""

    name: str
    story: str
    steps: tuple[Step, ...]


TEMPLATES = (
    Template(
        "more",
        "{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?",
        (("a", "+", "b"),),
    ),
    Template(
        "fewer",
        "{who} had {a} {things} and gave {b} of them to {other}. How many are left?",
        (("a", "-", "b"),),
    ),
    Template(
        "each",
        "{who} has {a} boxes with {b} {things} in each. How many {things} is that?",
        (("a", "*", "b"),),
    ),
    Template(
        "bags_more",
        "{who} buys {a} bags of {b} {things} and finds {c} more. How many {things} in all?",
        (("a", "*", "b"), ("x", "+", "c")),
    ),
    Template(
        "bags_lost",
        "A bag holds {a} {things}. {who} fills {b} bags and loses {c} {things}. "
        "How many {things} are left?",
        (("a", "*", "b"), ("x", "-", "c")),
    ),
    Template(
        "find_lose",
        "{who} has {a} {things}, finds {b} and loses {c}. How many {things} does {who} have?",
        (("a", "+", "b"), ("x", "-", "c")),
    ),
    Template(
        "both_more",
        "{who} has {a} {things}. {other} has {b} more than {who}. How many do they have together?",
        (("a", "+", "b"), ("a", "+", "x")),
    ),
    Template(
        "both_fewer",
        "{who} has {a} {things}. {other} has {b} fewer than {who}. How many do they have together?",
        (("a", "-", "b"), ("a", "+", "x")),
    ),
    Template(
        "both_times",
        "{who} has {a} {things}. {other} has {b} times as many. How many do they have together?",
        (("a", "*", "b"), ("a", "+", "x")),
    ),
    Template(
        "broken",
        "A box holds {a} {things} but {b} are broken. How many good ones are in {c} such boxes?",
        (("a", "-", "b"), ("x", "*", "c")),
    ),
    Template(
        "days",
        "{who} picks {a} {things} each morning and {b} each night. How many in {c} days?",
        (("a", "+", "b"), ("x", "*", "c")),
    ),
    Template(
        "two_kinds",
        "{who} has {a} boxes of {b} {things} and {c} bags of {d}. How many {things} in all?",
        (("a", "*", "b"), ("c", "*", "d"), ("x", "+", "y")),
    ),
    Template(
        "sell_find",
        "{who} has {a} bags of {b} {things}, sells {c} and finds {d}. How many are there now?",
        (("a", "*", "b"), ("x", "-", "c"), ("y", "+", "d")),
    ),
    Template(
        "both_find",
        "{who} has {a} {things}. {other} has {b} fewer. They find {c} more. "
        "How many do they have together?",
        (("a", "-", "b"), ("a", "+", "x"), ("y", "+", "c")),
    ),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A template with its holes filled."""

    template: Template
    numbers: tuple[int, ...]
    who: str
    other: str
    things: str

    @property
    def key(self) -> str:
        """Template and numbers: what the split is a hash of."""
        return f"{self.template.name}:{','.join(map(str, self.numbers))}"

    @property
    def split(self) -> Split:
        """80 % train, 10 % validation, 10 % held out, whatever sizes anybody asks for."""
        bucket = int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:4], "big") % 10
        return "held_out" if bucket == 0 else "validation" if bucket == 1 else "train"

    @property
    def question(self) -> str:
        holes = dict(zip("abcd", self.numbers, strict=False))
        return self.template.story.format(
            who=self.who, other=self.other, things=self.things, **holes
        )

    @property
    def results(self) -> tuple[int, ...]:
        """The results of the steps; the last one is the answer."""
        return tuple(result for *_, result in work(self.template.steps, self.numbers))

    def record(self) -> dict[str, str]:
        """The problem as a dataset record."""
        lines = work(self.template.steps, self.numbers)
        answer = str(lines[-1][-1])
        solution = f"{write(lines)}\n#### {answer}"
        return dict(question=self.question, answer=answer, solution=solution, key=self.key)


def work(
    steps: tuple[Step, ...], numbers: tuple[int, ...], errors: dict[int, int] | None = None
) -> list[tuple[int, str, int, int]]:
    """The steps in numbers, `(left, operator, right, result)`.

    Args:
        steps: operands as letters, see `Step`.
        numbers: what `a`, `b`, ... stand for.
        errors: step index -> what to add to its result; later steps go on with the wrong number.
    """
    known = dict(zip("abcd", numbers, strict=False))
    lines = []
    for index, (left, operator, right) in enumerate(steps):
        result = apply(known[left], operator, known[right]) + (errors or {}).get(index, 0)
        lines.append((known[left], operator, known[right], result))
        known["xyz"[index]] = result
    return lines


def write(lines: list[tuple[int, str, int, int]]) -> str:
    """The reasoning: `First 3 * 4 = 12. Then 12 + 5 = 17.`"""
    return " ".join(
        f"{word} {left} {operator} {right} = {result}."
        for word, (left, operator, right, result) in zip(WORDS, lines, strict=False)
    )


def apply(left: int, operator: str, right: int) -> int:
    """`left operator right` for `+`, `-` and `*`."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    raise ValueError(f"operator must be one of + - *, got {operator!r}")


def draw(rng: random.Random) -> Problem:
    """One problem of any split; templates are equally likely."""
    template = rng.choice(TEMPLATES)
    factors = {letter for step in template.steps if step[1] == "*" for letter in (step[0], step[2])}
    who, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    while True:
        letters = [letter for letter in "abcd" if f"{{{letter}}}" in template.story]
        numbers = tuple(rng.randint(2, 9 if letter in factors else 15) for letter in letters)
        problem = Problem(template, numbers, who, other, things)
        if all(0 < result <= 60 for result in problem.results):
            return problem


def draw_many(split: Split, n: int, seed: int = 0) -> list[Problem]:
    """`n` problems of `split`, no question twice; a pure function of its arguments."""
    rng, found = random.Random(f"word problems {split} {seed}"), {}
    for _ in range(200 * n + 1000):
        if len(found) >= n:
            break
        problem = draw(rng)
        if problem.split == split:
            found[problem.question] = problem
    else:
        raise ValueError(f"n must be smaller: {split!r} has too few different problems for {n}")
    return list(found.values())


def problems(split: Split, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Dataset records of `split`.

    Args:
        split: `"train"`, `"validation"` or `"held_out"`.
        n: how many; the first ones of a larger `n` are the same.
        seed: another seed draws other problems of the same split.

    Returns:
        Records with `question`, `answer` (a plain number), `solution` (reasoning and `#### answer`)
        and `key` (template and numbers, for asserting that two splits do not overlap).
    """
    return [problem.record() for problem in draw_many(split, n, seed)]
