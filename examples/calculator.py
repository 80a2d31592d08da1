"""Post-train a language model on word problems that it solves with a calculator.

    python examples/calculator.py --algo.name rloo --steps 10

As soon as the model writes "=", the result of the arithmetic before it is put into its answer, and
it goes on from there (the calculator annotations of Cobbe et al. 2021, arXiv:2110.14168). What the
calculator wrote is never trained on. Problems, rewards and flags are those of `gsm8k.py`;
`--no-calculator` leaves the tool out, for comparison.
"""

import ast
import dataclasses
import functools
import operator
import re
import sys
from fractions import Fraction
from typing import Any

import gsm8k
from config import Config
from task import Task
from training import main

from eqrl import samplers


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
# The arithmetic before an equals sign at the end of a text. Longer ones are left alone.
EXPRESSION = re.compile(r"([-+*/() \d]{3,60})=\s*$")
LARGEST = 10**9


@dataclasses.dataclass(frozen=True)
class CalculatorConfig(Config):
    """Post-train a language model on word problems that it solves with a calculator.

    --config run.yaml reads these names from YAML; the command line wins over it.
    """

    calculator: bool = True
    """insert the result after each equals sign"""
    turns: int = 8
    """results at most in a completion"""


def calculate(expression: str) -> Fraction | None:
    """The value of an expression of integers, + - * / and brackets; `None` for anything else."""

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int() as number):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
            case ast.BinOp(left=left, op=how, right=right) if type(how) in OPERATORS:
                return OPERATORS[type(how)](value(left), value(right))
        raise ValueError(f"{type(node).__name__} is no arithmetic")

    try:
        body = ast.parse(expression.strip(), mode="eval").body
        # A sign or a number alone is the end of a sentence, not something to work out.
        return value(body) if isinstance(body, ast.BinOp) else None
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def result(said: str) -> str:
    """What the calculator writes after a text that ends in "=": a whole number, or nothing."""
    found = EXPRESSION.search(said)
    number = None if found is None else calculate(found[1])
    if number is None or number.denominator != 1 or abs(number) > LARGEST:
        return ""
    return f" {number}"


def equals_signs(tokenizer: Any) -> tuple[int, ...]:
    """All tokens that are an equals sign and nothing else, white space apart."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, text in enumerate(texts) if text.strip() == "=")


def with_calculator(sampler: samplers.Sampler, tokenizer: Any, *, turns: int = 8) -> samplers.Turns:
    """The sampler whose completions have a calculator."""
    return samplers.Turns(
        sampler,
        samplers.text_tool(tokenizer, result),
        equals_signs(tokenizer),
        turns=turns,
        # One token a character and one in front, which no tokenizer exceeds.
        max_reply=len(str(-LARGEST)) + 2,
    )


def build(config: CalculatorConfig) -> Task:
    """The task of `gsm8k.py`, with a calculator around the sampler."""
    task = gsm8k.build(config)
    if not config.calculator:
        return task
    around = functools.partial(with_calculator, turns=config.turns)
    return dataclasses.replace(task, name=f"{task.name}, calculator", around=around)


if __name__ == "__main__":
    sys.exit(main(build, CalculatorConfig))
