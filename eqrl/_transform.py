"""Transforms: per-token signal in, per-token signal out, the rollout as read-only context.

The protocol is optax's `update(updates, state, params)`: `init() -> state` and
`update(signal, state, rollout) -> (signal, state)`. A reward goes in at the left of a chain and an
advantage comes out at its right. `a | b` chains, `a + b` adds two readings of the same signal,
`2.0 * a` scales. Every transform prints as the expression that builds it.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from ._lifted import Lifted, lift, number
from ._types import PerToken, Rollout, ScalarLike


_State = TypeVar("_State")


class AbstractTransform(eqx.Module, Generic[_State]):
    """One step from reward to advantage.

    Attributes:
        requires: names of the optional `Rollout` fields this transform reads. Chains take the
            union, and the training step computes nothing that nobody requires.
        reads_total: True if it reads each row's *total* (a score per completion), or adds
            to it, or accumulates rewards over the row.
        spreads: True if its output is no longer a reward but a value repeated over tokens, or a
            return; a total of it means nothing, so nothing that reads totals may follow.
        gathers: True if it makes a score per completion out of a spread signal, so that what
            reads totals may follow again.
        starts: True if it begins anew, from `rollout.rewards`, and discards the signal it is
            given; nothing may stand before it in a chain.
        min_group: the least number of completions of one prompt that it can learn from. Chains
            take the largest; `check_groups` refuses a run that samples fewer.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    reads_total: ClassVar[bool] = False
    spreads: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    min_group: ClassVar[int] = 1

    @abc.abstractmethod
    def init(self) -> _State:
        """The state before the first update; `None` for a stateless transform."""

    @abc.abstractmethod
    def update(self, signal: PerToken, state: _State, rollout: Rollout) -> tuple[PerToken, _State]:
        """The transformed signal and the next state."""

    def __call__(self, signal: PerToken, rollout: Rollout) -> PerToken:
        """The transformed signal, for transforms without state.

        Raises:
            ValueError: if the transform has state, which this call would lose.
        """
        state = self.init()
        if jtu.tree_leaves(state):
            raise ValueError(
                f"`{self!r}` has state: call `update(signal, state, rollout)` and keep the "
                "state it returns, instead of calling the transform"
            )
        check_shapes(signal, rollout)
        return self.update(signal, state, rollout)[0]

    def __or__(self, other: "AbstractTransform") -> "Chain":
        if not isinstance(other, AbstractTransform):
            return NotImplemented
        return Chain(_links(self) + _links(other))

    def __add__(self, other: "AbstractTransform") -> "Sum":
        if not isinstance(other, AbstractTransform):
            return NotImplemented
        return Sum(self, other)

    def __mul__(self, factor: ScalarLike) -> "Scaled":
        if isinstance(factor, AbstractTransform):
            return NotImplemented
        return Scaled(factor, self)

    __rmul__ = __mul__


def _links(transform: AbstractTransform) -> tuple[AbstractTransform, ...]:
    return transform.links if isinstance(transform, Chain) else (transform,)


def check_shapes(signal: PerToken, rollout: Rollout) -> None:
    """Refuses a signal that does not belong to the rollout."""
    # jaxtyping binds dims per argument list; it cannot see into a Module argument.
    if signal.shape != rollout.mask.shape:
        raise ValueError(
            f"signal has shape {signal.shape} but rollout.mask has {rollout.mask.shape}; "
            "pass the signal of the same rollout"
        )


class Chain(AbstractTransform[tuple]):
    """Transforms applied left to right; always flat."""

    links: tuple[AbstractTransform, ...]

    def __check_init__(self):
        spread_by = None
        for place, link in enumerate(self.links):
            if link.starts and place:
                raise ValueError(
                    f"`{link!r}` starts from the raw reward components, so "
                    f"`{self.links[place - 1]!r}` before it would have no effect; put "
                    f"`{link!r}` first"
                )
            if link.gathers and place and spread_by is None:
                raise ValueError(
                    f"`{link!r}` gathers a score from a signal that is spread over tokens, but "
                    f"`{self.links[place - 1]!r}` before it leaves rewards where they are, and all "
                    f"but the last would be lost; leave `{link!r}` out"
                )
            if link.reads_total and not link.starts and spread_by is not None:
                raise ValueError(
                    f"`{link!r}` reads each completion's total reward, but `{spread_by!r}` "
                    "before it has already spread the signal over tokens; put "
                    f"`{link!r}` first, or `as_score()` between the two, or normalise tokens with "
                    "`whiten()`"
                )
            spread_by = link if link.spreads else None if link.gathers else spread_by

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset().union(*(link.requires for link in self.links))

    @property
    def reads_total(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # A total read after the signal was spread inside the chain is refused above.
        return any(link.reads_total for link in self.links)

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        spread = False
        for link in self.links:
            spread = (spread or link.spreads) and not link.gathers
        return spread

    @property
    def gathers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.spreads and any(link.gathers for link in self.links)

    @property
    def starts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.links) and self.links[0].starts

    @property
    def min_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max((link.min_group for link in self.links), default=1)

    def init(self) -> tuple:
        return tuple(link.init() for link in self.links)

    def update(self, signal, state, rollout):
        check_shapes(signal, rollout)
        if len(state) != len(self.links):
            raise ValueError(
                f"state has {len(state)} entries but the chain has {len(self.links)} links; "
                "use the state that `init()` of this very chain returned"
            )
        states = []
        for link, link_state in zip(self.links, state, strict=True):
            signal, link_state = link.update(signal, link_state, rollout)
            states.append(link_state)
        return signal, tuple(states)

    def __repr__(self) -> str:
        return " | ".join(
            f"({link!r})" if isinstance(link, Sum) else repr(link) for link in self.links
        )


class Sum(AbstractTransform[tuple]):
    """Two readings of the same signal, added."""

    left: AbstractTransform
    right: AbstractTransform

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.requires | self.right.requires

    @property
    def reads_total(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.reads_total or self.right.reads_total

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.spreads or self.right.spreads

    @property
    def gathers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.gathers and self.right.gathers

    @property
    def starts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # What stands before a sum with one such part is still read by the other part.
        return self.left.starts and self.right.starts

    @property
    def min_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(self.left.min_group, self.right.min_group)

    def init(self) -> tuple:
        return self.left.init(), self.right.init()

    def update(self, signal, state, rollout):
        left, left_state = self.left.update(signal, state[0], rollout)
        right, right_state = self.right.update(signal, state[1], rollout)
        return left + right, (left_state, right_state)

    def __repr__(self) -> str:
        # `|` binds weaker than `+` in Python, so a chain inside a sum needs its parentheses; so
        # does a sum on the right, which would otherwise read back as a sum on the left.
        left = f"({self.left!r})" if isinstance(self.left, Chain) else repr(self.left)
        right = f"({self.right!r})" if isinstance(self.right, Chain | Sum) else repr(self.right)
        return f"{left} + {right}"


class Scaled(AbstractTransform[_State]):
    """A transform's output times a number."""

    factor: ScalarLike
    transform: AbstractTransform[_State]

    @property
    def requires(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.requires

    @property
    def reads_total(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.reads_total

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.spreads

    @property
    def gathers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.gathers

    @property
    def starts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.starts

    @property
    def min_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.transform.min_group

    def init(self) -> _State:
        return self.transform.init()

    def update(self, signal, state, rollout):
        signal, state = self.transform.update(signal, state, rollout)
        return self.factor * signal, state

    def __repr__(self) -> str:
        inner = repr(self.transform)
        if isinstance(self.transform, Chain | Sum | Scaled):
            inner = f"({inner})"
        return f"{number(self.factor)} * {inner}"


class Stateless(AbstractTransform[None]):
    """A function `(signal, rollout, **hyperparameters) -> signal` as a transform.

    Build one with `eqrl.stateless`. Numeric hyperparameters are leaves of the tree, so `jax.vmap`
    over them works; words, booleans and `None` are static options. Two transforms built alike are
    equal and share one compilation.
    """

    lifted: Lifted
    requires: frozenset[str] = eqx.field(static=True)  # pyright: ignore
    reads_total: bool = eqx.field(static=True)  # pyright: ignore
    spreads: bool = eqx.field(static=True)  # pyright: ignore
    gathers: bool = eqx.field(static=True)  # pyright: ignore
    starts: bool = eqx.field(static=True)  # pyright: ignore
    min_group: int = eqx.field(static=True)  # pyright: ignore

    def init(self) -> None:
        return None

    def update(self, signal, state, rollout):
        del state
        check_shapes(signal, rollout)
        return self.lifted(signal, rollout), None

    def __repr__(self) -> str:
        return repr(self.lifted)


def stateless(
    fn: Callable[..., PerToken],
    *,
    builder: Callable | None = None,
    requires: tuple[str, ...] = (),
    reads_total: bool = False,
    spreads: bool = False,
    gathers: bool = False,
    starts: bool = False,
    min_group: int = 1,
    **hyperparameters: Any,
) -> Stateless:
    """Lifts a typed function to a transform.

    ```python
    def best_of(signal, rollout, *, bonus):
        return bonus * signal

    advantage = eqrl.stateless(best_of, bonus=2.0) | eqrl.whiten()
    ```

    Args:
        fn: `(signal, rollout, **hyperparameters) -> signal`, pure and jittable.
        builder: the public function that the transform prints as; `fn` itself by default.
        requires: optional `Rollout` fields that `fn` reads.
        reads_total: see `AbstractTransform`.
        spreads: see `AbstractTransform`.
        gathers: see `AbstractTransform`.
        starts: see `AbstractTransform`.
        min_group: see `AbstractTransform`.
        **hyperparameters: passed to `fn` by keyword.

    Returns:
        A transform that chains, prints, compares and jits like the built-in ones.
    """
    return Stateless(
        lifted=lift(fn, builder, hyperparameters),
        requires=frozenset(requires),
        reads_total=reads_total,
        spreads=spreads,
        gathers=gathers,
        starts=starts,
        min_group=min_group,
    )


def _parts(transform: AbstractTransform) -> tuple[AbstractTransform, ...]:
    match transform:
        case Chain():
            inner = transform.links
        case Sum():
            inner = (transform.left, transform.right)
        case Scaled():
            inner = (transform.transform,)
        case _:
            return (transform,)
    return tuple(part for outer in inner for part in _parts(outer))


def check_groups(transform: AbstractTransform, samples_per_prompt: int) -> None:
    """Refuses a run that samples fewer completions per prompt than `transform` compares.

    Raises:
        ValueError: naming the part that needs more.
    """
    for part in _parts(transform):
        if samples_per_prompt < part.min_group:
            raise ValueError(
                f"`{part!r}` compares completions of one prompt, so it needs at least "
                f"{part.min_group} per prompt but gets {samples_per_prompt}; sample more of "
                "them, or use `batch_center()`, which compares with the whole batch"
            )
