"""Read the number a text answers with, exactly, in time linear in the text.

Every pattern below is linear: runs of digits are matched possessively and every other repetition
is bounded, so no completion, however adversarial, can make a reward slow. Numbers that take
more than `MAX_LENGTH` characters are not read.
"""

import re
from fractions import Fraction


# Far above any school answer, far below where integer arithmetic gets slow.
MAX_LENGTH = 300

_TIDY = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u00a0": " "})
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3})")
_LATEX_ESCAPE = re.compile(r"\\([$%])")

_CURRENCY = r"[$\u20ac\u00a3\u00a5\u20b9]"
# A minus is a sign only where it cannot be an operator, a range or a hyphen: not after a word, a
# closing bracket or another minus, and not after "digit space" ("10 -5").
_SIGN = rf"(?:(?<![\w)\]}}%\-])(?<![0-9] )-(?={_CURRENCY}?[0-9.\\]))"
_PLAIN = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,40}+(?![0-9])|[0-9]++)(?:\.[0-9]++)?"
    r"|(?<![\w.])\.[0-9]++)"
)
_FRAC = (
    rf"\\[dt]?frac ?(?:\{{ ?(?P<top>-?{_PLAIN}) ?\}} ?\{{ ?(?P<bottom>-?{_PLAIN}) ?\}}"
    r"|(?P<top1>[0-9])(?P<bottom1>[0-9]))"
)
# Atomic: once read, a number is never shortened to make the rest of a pattern fit.
_NUMBER = (
    rf"(?>(?P<sign>{_SIGN})?{_CURRENCY}?(?P<sign2>{_SIGN})?"
    rf"(?:(?P<mixed>[0-9]{{1,9}}+) ?{_FRAC}"
    r"|(?P<whole>[0-9]{1,9}+) (?P<part>[0-9]{1,9}+)/(?P<parts>[0-9]{1,9}+)(?![.,]?[0-9]|/)"
    rf"|{_FRAC.replace('top', 'up').replace('bottom', 'down')}"
    rf"|(?P<over>{_PLAIN})(?: ?/ ?(?P<under>{_PLAIN})|[eE](?P<power>[+-]?[0-9]{{1,3}}+)(?!\w))?))"
)
_ANY = re.compile(_NUMBER)
# What may stand between a marker and its number; "#### 1. First" is a numbered heading instead.
_LEAD = r"[ \t]{0,8}(?![0-9]{1,2}[.)][ \t]+\w)(?:\*{1,2}|\\\(|\$)?(?:\\boxed\{)?"


def extract_number(text: str) -> Fraction | None:
    r"""The number a free-form answer states, or `None` where there is none.

    Explicit markers come first: the last `<answer>...</answer>` (an unclosed one reaches to the
    end), the last `\boxed{...}` and the last `#### number`. Where several of them hold a number,
    the one standing latest in the text counts. Without any, the last number of the text counts.
    Inside `<answer>` and `\boxed` the last number counts, too ("3 + 4 = 7").

    Reads `-5` (also with the Unicode minus), `1,450`, `1{,}450`, `.5`, `3/4`, `1 1/2`,
    `\frac{3}{4}`, `2\frac12`, `1.5e3`, and ignores currency signs, percent signs and units: "50%"
    is 50. Division by zero and numbers of more than 300 characters are not read.

    Args:
        text: a completion, or a gold answer.

    Returns:
        The exact value, so that `0.75`, `3/4` and `\frac{6}{8}` are equal and `0.333` is not
        `1/3`.
    """
    text = _tidy(text)
    marked = [_last_in(text, *span) for span in (_tag_span(text), _boxed_span(text))]
    marked.append(_after_marker(text, "####"))
    found = [hit for hit in marked if hit is not None]
    if found:
        return max(found)[1]
    last = _last_in(text, 0, len(text))
    return None if last is None else last[1]


def number_after(text: str, marker: str = "####") -> Fraction | None:
    """The number directly after the last `marker` that has one, on the same line.

    This is the strict reading. Spaces and a currency sign may stand between; words may not.
    `#### 1. First step` is a heading, no answer.
    Args:
        text: a completion.
        marker: the text that announces the answer.

    Returns:
        The exact value, or `None`.

    Raises:
        ValueError: if `marker` is empty.
    """
    if not marker:
        raise ValueError('`marker` is empty; name the text that announces the answer, as "####"')
    hit = _after_marker(_tidy(text), marker)
    return None if hit is None else hit[1]


def _tidy(text: str) -> str:
    """One minus, one thousands separator, no LaTeX escapes: fewer spellings to match."""
    text = text.translate(_TIDY)
    if "\\" in text or "{" in text:
        text = _LATEX_ESCAPE.sub(r"\1", _LATEX_COMMA.sub(",", text))
    return text


def _tag_span(text: str) -> tuple[int, int]:
    start = text.rfind("<answer>")
    if start < 0:
        return 0, 0
    end = text.find("</answer>", start)
    return start + len("<answer>"), len(text) if end < 0 else end


def _boxed_span(text: str) -> tuple[int, int]:
    r"""The inside of the last `\boxed{...}`, braces balanced; empty where it never closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return 0, 0
    start += len(r"\boxed{")
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start, brace.start()
    return 0, 0


def _last_in(text: str, start: int, end: int) -> tuple[int, Fraction] | None:
    """End and value of the last readable number of `text[start:end]`."""
    last = None
    for match in _ANY.finditer(text, start, end):
        value = _value(match)
        if value is not None:
            last = match.end(), value
    return last


def _after_marker(text: str, marker: str) -> tuple[int, Fraction] | None:
    """End and value of the number right after the last `marker` that has one."""
    last = None
    for match in re.compile(re.escape(marker) + _LEAD + _NUMBER).finditer(text):
        value = _value(match)
        if value is not None:
            last = match.end(), value
    return last


def _value(match: re.Match[str]) -> Fraction | None:
    """The exact value of one match; `None` for a zero denominator or too many digits."""
    get = match.group
    if match.end() - match.start() > MAX_LENGTH:
        return None
    if get("over"):
        value = _ratio(get("over"), get("under") or "1")
        if value is not None and get("power"):
            value *= Fraction(10) ** int(get("power"))
    elif get("whole"):
        value = _mixed(get("whole"), _ratio(get("part"), get("parts")))
    elif get("mixed"):
        value = _mixed(
            get("mixed"), _ratio(get("top") or get("top1"), get("bottom") or get("bottom1"))
        )
    else:
        value = _ratio(get("up") or get("up1"), get("down") or get("down1"))
    if value is not None and (get("sign") or get("sign2")):
        value = -value
    return value


def _mixed(whole: str, part: Fraction | None) -> Fraction | None:
    """`1 1/2` is 3/2; beside an improper fraction the integer is not part of the number."""
    return part if part is None or part >= 1 else int(whole) + part


def _ratio(over: str, under: str) -> Fraction | None:
    denominator = Fraction(under.replace(",", ""))
    return Fraction(over.replace(",", "")) / denominator if denominator else None
