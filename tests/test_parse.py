"""Expressions read back as what printed them, and nothing else is read."""

import random

import numpy as np
import pytest

from eqrl import _advantages as signals, _losses as losses
from eqrl._parse import parse
from eqrl._select import drop_constant_groups, drop_truncated
from eqrl._transform import stateless


LINKS = [
    signals.batch_center(),
    signals.group_norm(ddof=0),
    signals.group_norm(eps=1e-4),
    signals.rloo(),
    signals.kl_penalty(0.01, estimator="k3"),
    signals.overlong(64, 16, penalty=0.5),
    signals.gae(0.99, 1),
    signals.returns(gamma=1),
    signals.clip(5.0),
    signals.scale(-1e-05),
    signals.shift(-2),
    signals.whiten(eps=0),
    signals.ema_baseline(0.5),
    signals.add_values(),
]
PARTS = [
    losses.clipped(),
    losses.clipped(0.2, 0.28, dual=3.0),
    losses.clipped(dual=3),
    losses.kl("k2"),
    losses.reinforce(),
    losses.value_loss(None),
    losses.value_loss(0.5),
    losses.entropy_bonus(),
]


def compose(rng, parts, operations, depth):
    """A random expression; chains that refuse each other are tried again."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(parts)
    match rng.choice(operations):
        case "*":
            factor = rng.choice([0.2, -1.0, 2, -3, 1e-8, 0])
            return factor * compose(rng, parts, operations, depth - 1)
        case operation:
            left = compose(rng, parts, operations, depth - 1)
            right = compose(rng, parts, operations, depth - 1)
            try:
                return left | right if operation == "|" else left + right
            except ValueError as error:
                assert "already spread" in str(error)
                return left


@pytest.mark.parametrize("seed", range(60))
def test_compositions_read_back(seed):
    rng = random.Random(seed)
    for parts, operations in ((LINKS, "||+*"), (PARTS, "++*")):
        piece = compose(rng, parts, operations, depth=4)
        assert parse(repr(piece)) == piece
        assert repr(parse(repr(piece))) == repr(piece)


def test_compositions_nest():
    # The generator does reach the shapes where precedence matters.
    texts = [
        repr(compose(random.Random(seed), LINKS, "||+*", 4)) for seed in range(60)
    ]  # fmt: skip
    for shape in ("* (", "(", " | (", " + ", " | "):
        assert any(shape in text for text in texts), shape


@pytest.mark.parametrize(
    "text, piece",
    [
        ("rloo() | whiten() | clip(5.0)", signals.rloo() | signals.whiten() | signals.clip(5.0)),
        (
            "group_norm() + 0.2 * batch_norm()",
            signals.group_norm() + 0.2 * signals.batch_norm(),
        ),
        ("(rloo() | clip(limit=5.0))", signals.rloo() | signals.clip(5.0)),
        ("(rloo() | whiten()) | clip(5.0)", signals.rloo() | signals.whiten() | signals.clip(5.0)),
        ("rloo() * -2", -2 * signals.rloo()),
        ("  rloo()\n | whiten() ", signals.rloo() | signals.whiten()),
        ("clipped(high=0.28) + 0.04 * kl()", losses.clipped(0.2, 0.28) + 0.04 * losses.kl()),
        ("constant_length(64)", losses.constant_length(64)),
        ("drop_constant_groups() & drop_truncated()", drop_constant_groups() & drop_truncated()),
        (
            "drop_truncated() & (drop_truncated() & drop_constant_groups())",
            drop_truncated() & (drop_truncated() & drop_constant_groups()),
        ),
    ],
)
def test_texts_read_as_python_would(text, piece):
    assert parse(text) == piece
    assert parse(repr(piece)) == piece


@pytest.mark.parametrize(
    "piece, text",
    [
        (signals.group_norm(), "group_norm()"),
        (signals.clip(5.0), "clip(5.0)"),
        (signals.kl_penalty(0.01), "kl_penalty(0.01)"),
        (signals.overlong(64, 16, penalty=2.0), "overlong(64, 16, penalty=2.0)"),
        (signals.ema_baseline(), "ema_baseline()"),
        (losses.clipped(0.2, 0.28), "clipped(high=0.28)"),
        (losses.value_loss(None), "value_loss(clip=None)"),
        (0.5 * (signals.rloo() | signals.clip(1.0)), "0.5 * (rloo() | clip(1.0))"),
        (
            signals.clip(1.0) | (signals.rloo() + signals.batch_norm()),
            "clip(1.0) | (rloo() + batch_norm())",
        ),
    ],
)
def test_pieces_print_shortest(piece, text):
    assert repr(piece) == text


@pytest.mark.parametrize(
    "text, reason, column",
    [
        ("whitn()", "there is no `whitn`; did you mean `whiten`", 0),
        ("rloo() | whiten() | clipp(5.0)", "there is no `clipp`; did you mean `clip", 20),
        ("rloo() | qqqqqqqq()", "there is no `qqqqqqqq`", 9),
        ("rloo() | whiten", "`whiten` is not called; write `whiten", 9),
        ("rloo() | whiten(", "this is not an expression", None),
        ("rloo() |", "this is not an expression", 8),
        ("", "this is not an expression", 0),
        ("scale()", r"missing a required argument: 'factor'.* `scale\(factor\)`", 0),
        ("scale(1.0, 2.0)", r"too many positional arguments.* `scale\(factor\)`", 0),
        ("batch_norm(epsilon=1)", r"'epsilon'.* `batch_norm\(\*, ddof=1, eps=1e-08\)`", 0),
        ("rloo() | clip(-1)", "limit=-1 is out of range; pass a finite number above 0", 9),
        ("kl_penalty(0.1, estimator='k9')", "estimator='k9' is not known", 0),
        ("rloo() | group_norm()", r"`group_norm\(\)` reads each completion's total", 0),
        ("2.0", r"this gives 2\.0, not a piece", 0),
        ("whiten() + clipped()", r"`\+` cannot combine whiten\(\) and clipped\(\)", 0),
        ("rloo() * whiten()", r"`\*` cannot combine", 0),
        ("rloo() | 2.0", r"`\|` cannot combine rloo\(\) and 2\.0", 0),
        ("rloo() & whiten()", "`&` cannot combine", 0),
        ("2 * 3", r"`\*` cannot combine 2 and 3", 0),
        ("rloo() - whiten()", "only the operators", 0),
        ("rloo() ** 2", "only the operators", 0),
        ("-rloo()", "no plain number", 1),
        ("clip(1 + 1)", "cannot combine 1 and 1", 5),
        ("clip(1j)", "no plain number", 5),
        ("clip(*[1.0])", "no plain number", 5),
        ("clip(**{'limit': 1.0})", r"`\*\*` is not allowed", 5),
        ("clip(limit=[].__class__)", "no plain number", 11),
        ("__import__('os').system('x')", "only a builder's name can be called", 0),
        ("rloo.__globals__", "only calls", 0),
        ("(lambda: rloo())()", "only a builder's name can be called", 0),
        ("[rloo()]", "only calls", 0),
        ("rloo() if 1 else rloo()", "only calls", 0),
        ("rloo(); whiten()", "this is not an expression", 6),
        ("é() | rloo()", "there is no `é`", 0),
        ("scale(1.0) | é()", "there is no `é`", 13),
        ("kl_penalty(1.0, estimator='é')", "estimator='é' is not known", 0),
    ],
)
def test_everything_else_is_refused_with_a_place(text, reason, column):
    with pytest.raises(ValueError, match=reason) as caught:
        parse(text)
    message, shown, caret = str(caught.value).rsplit("\n", 2)
    assert shown == f"  {text}"
    if column is not None:
        assert caret == "  " + " " * column + "^"
    assert "\n" not in message


@pytest.mark.parametrize("text", ["-" * 3000 + "1", "(" * 1500 + "rloo()" + ")" * 1500])
def test_deep_nesting_is_refused(text):
    with pytest.raises(ValueError, match="nested too deeply|not an expression"):
        parse(text)
    with pytest.raises(ValueError, match="write at most"):
        parse("rloo()" + " | whiten()" * 1000)


def doubled(signal, rollout, *, times):
    del rollout
    return times * signal


def test_users_builders_join_by_name():
    def twice(times):
        return stateless(doubled, builder=twice, times=times)

    piece = twice(3.0) | signals.rloo()
    assert parse("twice(3.0) | rloo()", names={"twice": twice}) == piece
    assert parse(repr(piece), names={"twice": twice}) == piece
    with pytest.raises(ValueError, match="there is no `twice`"):
        parse(repr(piece))
    # The caret counts characters, not the bytes that Python's syntax tree counts.
    with pytest.raises(ValueError, match=r"`twce`(.|\n)*\n {11}\^$"):
        parse("é(2.0) | twce()", names={"é": twice, "twice": twice})


def test_numpy_numbers_print_as_numbers():
    assert repr(signals.clip(np.float64(5.0))) == "clip(5.0)"
    assert repr(np.float32(0.5) * losses.kl()) == "0.5 * kl()"
