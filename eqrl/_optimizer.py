"""What optax leaves open for a model with stacked layers and a critic beside the policy.

Layer parameters carry a leading layer axis, so the number of axes does not tell a matrix from a
vector: a stacked bias is 2-D. The parts here go by the field's name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from jaxtyping import Array, Float, PyTree

from ._types import ScalarLike, wide as wide_type


# Lookup tables and vectors: shrinking them, or making them orthogonal, has no use.
_NOT_MATRICES = ("norm", "bias", "embedding", "head")


def matrices(params: PyTree) -> PyTree[bool]:
    """True for the matrices inside layers: the leaves to decay, and those Muon is for.

    By name, because stacked vectors have two axes: a leaf is a matrix if it has at least two axes
    and its field's name does not end in `norm`, `bias`, `embedding` or `head`.

    Args:
        params: parameters, `None` where there is nothing to train.

    Returns:
        A tree of booleans with the structure of `params`.
    """
    return jtu.tree_map_with_path(_is_matrix, params)


def _is_matrix(path, leaf) -> bool:
    names = [key.name for key in path if isinstance(key, jtu.GetAttrKey)]
    return leaf.ndim >= 2 and not any(name.endswith(_NOT_MATRICES) for name in names[-1:])


def warmup_cosine(
    peak: float, updates: int, *, warmup_updates: int = 0
) -> Callable[[ScalarLike], Float[Array, ""]]:
    r"""Linear warm-up to `peak`, then a half cosine towards 0, counted in optimizer updates.

    Update $n$ (from 0) has the rate $peak\,(n+1)/w$ while $n < w$, and
    $peak\,(1+\cos(\pi (n-w)/(N-w)))/2$ after; 0 from update $N$ on. So no update of the run has
    rate 0, the first and the last included. (optax's own warm-up starts at its `init_value`, and
    a schedule sized by rollout batches instead of updates ends too late or too early.)

    Args:
        peak: the largest rate.
        updates: N, optimizer updates of the whole run.
        warmup_updates: w, how many of them warm up, fewer than `updates`.

    Raises:
        ValueError: if nothing is left after the warm-up.
    """
    if not 0 <= warmup_updates < max(updates, 1):
        raise ValueError(
            f"warmup_updates={warmup_updates} must be below updates={updates}; shorten the warm-up"
        )

    def schedule(count: ScalarLike) -> Float[Array, ""]:
        n = jnp.asarray(count).astype(jnp.float32)
        rising = peak * (n + 1.0) / max(warmup_updates, 1)
        done = jnp.clip((n - warmup_updates) / max(updates - warmup_updates, 1), 0.0, 1.0)
        return jnp.where(n < warmup_updates, rising, peak * (1.0 + jnp.cos(jnp.pi * done)) / 2)

    return schedule


def muon(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Muon for the matrices inside layers, each layer's on its own; AdamW for everything else.

    Updates are scaled to AdamW's size (RMS 0.2), so a rate that suits AdamW suits Muon.

    Args:
        learning_rate: for both parts.
        weight_decay: of the matrices; the rest is not decayed.

    Source: Jordan et al. 2024; the scale: Liu et al. 2025 (arXiv:2502.16982).
    """
    # Axes that are neither reduction nor output are batch axes: the stacked layers.
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions(params: PyTree) -> PyTree:
        return jax.tree.map(lambda yes: matrix if yes else None, matrices(params))

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )


def actor_critic(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation over the pair `(policy, critic)`, whose halves know nothing of each other.

    Clipping and rates are each half's own. The critic may be `None`.

    Args:
        policy: for the first of the pair.
        critic: for the second; unused where that is `None`.
    """

    def init(params) -> Any:
        actor, value = params
        return policy.init(actor), None if value is None else critic.init(value)

    def update(updates, state, params=None) -> Any:
        actor, value = (None, None) if params is None else params
        new_actor, actor_state = policy.update(updates[0], state[0], actor)
        if updates[1] is None:
            return (new_actor, None), (actor_state, None)
        new_value, value_state = critic.update(updates[1], state[1], value)
        return (new_actor, new_value), (actor_state, value_state)

    return optax.GradientTransformation(init, update)


def float32_state(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its state, its arithmetic and a copy of narrow parameters in float32.

    optax makes moments in the parameters' type; a bfloat16 second moment with decay 0.999 never
    moves. And a bfloat16 weight does not move by less than 1/256 of itself, which swallows most
    updates at the rates of reinforcement learning: so narrower parameters follow a float32 master
    copy in the state. Parameters in float32 or wider have no copy.

    Args:
        inner: the transformation to wrap.
    """

    def init(params):
        return _masters(params), inner.init(_widened(params))

    def update(updates, state, params=None):
        masters, inner_state = state
        if params is None:
            raise ValueError("params is None; pass the parameters, float32 copies follow them")
        current = _merged(masters, _widened(params))
        change, inner_state = inner.update(_widened(updates), inner_state, current)
        masters = _where_narrow(params, jax.tree.map(jnp.add, current, change))
        # What to add to a narrow parameter so that it becomes its rounded master.
        to_master = jax.tree.map(
            lambda m, p: None if m is None else m - p.astype(m.dtype),
            masters,
            params,
            is_leaf=lambda x: x is None,
        )
        return _merged(to_master, change), (masters, inner_state)

    return optax.GradientTransformation(init, update)


def _widened(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(wide_type(x.dtype)), tree)


def _where_narrow(params: PyTree, tree: PyTree) -> PyTree:
    """`tree` where the parameter is narrower than float32, `None` elsewhere."""
    return jax.tree.map(lambda p, x: x if p.dtype != wide_type(p.dtype) else None, params, tree)


def _masters(params: PyTree) -> PyTree:
    return _where_narrow(params, _widened(params))


def _merged(masters: PyTree, params: PyTree) -> PyTree:
    """The master copies where there are some, the parameters elsewhere."""
    return jax.tree.map(
        lambda m, p: p if m is None else m, masters, params, is_leaf=lambda x: x is None
    )
