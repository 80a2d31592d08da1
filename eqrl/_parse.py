"""Read back the expressions that transforms, terms, factors, weightings and selections print.

The text is walked as a syntax tree in which only calls of known builders, `|`, `+`, `*`, `&`,
parentheses and literals have a meaning; nothing is ever evaluated.
"""

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from . import _advantages, _losses, _select
from ._losses.base import AbstractTerm
from ._losses.factor import AbstractFactor
from ._losses.ratio import Ratio
from ._losses.weighting import Weighting
from ._select.base import AbstractSelection
from ._transform import AbstractTransform


Part = AbstractTransform | AbstractTerm | AbstractFactor | Ratio | Weighting | AbstractSelection

_OPERATORS = {
    ast.BitOr: ("|", operator.or_),
    ast.Add: ("+", operator.add),
    ast.Mult: ("*", operator.mul),
    ast.BitAnd: ("&", operator.and_),
}
_LONGEST = 4000  # characters; no sane chain comes near, and nesting is bounded by it


def _builders(module: Any) -> dict[str, Callable]:
    return {name: x for name, x in vars(module).items() if inspect.isfunction(x)}


def parse(text: str, *, names: Mapping[str, Callable] | None = None) -> Part:
    """Builds what an expression such as `"rloo() | whiten() | clip(5.0)"` says.

    For every built-in piece and composition `x`, `parse(repr(x)) == x`.

    Args:
        text: the expression, as Python would spell it.
        names: further builders, by the name the text uses; they may replace built-in ones.

    Returns:
        A transform, term, factor, ratio, weighting or selection.

    Raises:
        ValueError: with the reason and a caret under the place.
    """
    # One line, so that a caret under it points somewhere; YAML folds long expressions anyway.
    text = " ".join(text.split())
    builders = _builders(_advantages) | _builders(_losses) | _builders(_select)
    reader = _Reader(text, builders | dict(names or {}))
    if len(text) > _LONGEST:
        raise ValueError(f"the expression has {len(text)} characters; write at most {_LONGEST}")
    try:
        tree = ast.parse(text, mode="eval").body
        part = reader.read(tree)
    except SyntaxError as error:
        # Python reports what is missing at the end as column 0.
        place = error.offset - 1 if error.offset else len(text)
        reader.refuse(place, f"this is not an expression ({error.msg})")
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply; write it flatter") from None
    if not isinstance(part, Part):
        reader.refuse(0, f"this gives {part!r}, not a piece; call a builder, such as `whiten()`")
    return part


class _Reader:
    """One walk over one expression."""

    def __init__(self, text: str, builders: dict[str, Callable]):
        self.text = text
        self.builders = builders

    def refuse(self, place: int | ast.AST, reason: str) -> NoReturn:
        if isinstance(place, ast.AST):
            # `col_offset` counts bytes of UTF-8.
            before = self.text.encode()[: getattr(place, "col_offset", 0)]
            place = len(before.decode(errors="ignore"))
        raise ValueError(f"{reason}\n  {self.text}\n  {' ' * place}^")

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Call():
                return self.call(node)
            case ast.BinOp():
                return self.combine(node)
            case ast.Constant() | ast.UnaryOp():
                return self.literal(node)
            case ast.Name(id=name) if name in self.builders:
                self.refuse(node, f"`{name}` is not called; write `{name}(...)`")
            case ast.Name(id=name):
                self.unknown(node, name)
        self.refuse(node, "only calls, `|`, `+`, `*`, `&`, numbers and parentheses are allowed")

    def argument(self, node: ast.expr) -> Any:
        """A literal, or a piece: `clipped(ratio=geometric_ratio())`."""
        return self.read(node) if isinstance(node, ast.Call | ast.BinOp) else self.literal(node)

    def literal(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return node.value
            case ast.UnaryOp(op=ast.USub()):
                value = self.literal(node.operand)
                if isinstance(value, int | float):
                    return -value
        self.refuse(node, "this is no plain number, string, True, False or None; write one")

    def combine(self, node: ast.BinOp) -> Any:
        left, right = self.read(node.left), self.read(node.right)
        if type(node.op) not in _OPERATORS:
            self.refuse(node, "only the operators `|`, `+`, `*` and `&` combine pieces")
        symbol, function = _OPERATORS[type(node.op)]
        scaling = symbol == "*" and isinstance(left, int | float) != isinstance(right, int | float)
        if not (scaling or (isinstance(left, Part) and isinstance(right, Part))):
            self.refuse(node, f"`{symbol}` cannot combine {left!r} and {right!r}")
        try:
            return function(left, right)
        except TypeError:
            self.refuse(node, f"`{symbol}` cannot combine {left!r} and {right!r}")
        except ValueError as error:
            self.refuse(node, str(error))

    def call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            self.refuse(node, "only a builder's name can be called")
        name = node.func.id
        if name not in self.builders:
            self.unknown(node, name)
        builder = self.builders[name]
        arguments = [self.argument(argument) for argument in node.args]
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.refuse(keyword, "`**` is not allowed; write each argument out")
            keywords[keyword.arg] = self.argument(keyword.value)
        try:
            inspect.signature(builder).bind(*arguments, **keywords)
        except TypeError as error:
            self.refuse(node, f"{error}: call it as `{name}{_signature(builder)}`")
        try:
            return builder(*arguments, **keywords)
        except ValueError as error:
            self.refuse(node, str(error))

    def unknown(self, node: ast.AST, name: str) -> NoReturn:
        near = difflib.get_close_matches(name, self.builders, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "is it spelled as in `import eqrl`?"
        known = ", ".join(sorted(self.builders))
        self.refuse(node, f"there is no `{name}`; {hint} Known: {known}")


def _signature(builder: Callable) -> str:
    """The builder's parameters with defaults and without annotations."""
    signature = inspect.signature(builder)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))
