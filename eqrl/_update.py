"""One optimizer step: score, loss, gradient over micro-batches, guard, apply."""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._logprobs import Implementation
from ._losses.ratio import log_ratio
from ._masked import zero_unmasked
from ._pack import pad_rows
from ._score import buffer_size, parts_of, row_shards, score, split
from ._types import Batch, Metrics, ScalarLike, Scores, wide
from .algorithms import Algorithm
from .models import Transformer, ValueModel


Models: TypeAlias = tuple[Transformer, ValueModel | None]


class TrainState(eqx.Module):
    """Everything that changes while training, in one tree.

    Attributes:
        policy: the policy in training.
        critic: the value model, if the algorithm has one.
        optimizer: optax state over the pair `(policy, critic)`.
        algorithm: state of the algorithm's estimators (running baselines, controllers).
        updates: optimizer steps applied.
        skipped: optimizer steps skipped because a gradient was not finite.
    """

    policy: Transformer
    critic: ValueModel | None
    optimizer: PyTree
    algorithm: PyTree
    updates: Int[Array, ""]
    skipped: Int[Array, ""]


def init(
    policy: Transformer,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    critic: ValueModel | None = None,
) -> TrainState:
    """The state before the first update.

    The state owns copies of the models, because `update` donates its buffers: the arrays passed
    in stay valid, for instance as the frozen reference.

    Args:
        policy: the starting policy.
        algorithm: whose estimators' state is created.
        optimizer: an optax transformation over the pair `(policy, critic)`.
        critic: needed exactly if the algorithm reads values.

    Raises:
        ValueError: if the algorithm needs a critic and there is none, or the other way round.
    """
    if ("values" in algorithm.requires) != (critic is not None):
        raise ValueError(
            "critic must be given exactly when the algorithm reads values; this algorithm "
            + ("does: pass critic=" if critic is None else "does not: pass critic=None")
        )
    models = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, (policy, critic))
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(eqx.filter(models, eqx.is_inexact_array))
    # One buffer a leaf: a donated buffer must not be referenced twice.
    state = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        policy=models[0],
        critic=models[1],
        optimizer=state,
        algorithm=algorithm.init(),
        updates=zero,
        skipped=jnp.copy(zero),
    )


def update(
    state: TrainState,
    batch: Batch,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch: int | None = None,
    temperature: ScalarLike = 1.0,
    implementation: Implementation = None,
    buffer: int | None = None,
    remat: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch.

    The batch is cut into micro-batches, which a `lax.scan` inside one compiled program runs
    through; the gradient does not depend on the cut, because `batch.weights` were computed for
    all rows. A gradient that is not finite changes nothing and is counted in `state.skipped`.

    Args:
        state: consumed: its buffers are donated to the result.
        batch: from `algorithm.assign`, or a part of one from `algorithm.weigh`.
        algorithm: gives the loss.
        optimizer: the one `init` was called with.
        micro_batch: rows a pass; all rows by default. Rows are padded if it does not divide them.
        temperature: the sampling temperature.
        implementation: of `token_logprobs`.
        buffer: room for the masked tokens of the fullest micro-batch: on a mesh, row shards times
            those of the fullest shard. Counted by default, which needs the mask's values: inside
            `jit` it must be given, and tokens beyond it are lost.
        remat: recompute layers in the backward pass, for less memory.

    Returns:
        The next state, and metrics that are exact over the whole batch.
    """
    rows = batch.weights.shape[0]
    shards = row_shards(batch.weights)
    parts, padded_rows = parts_of(rows, micro_batch, shards)
    batch = pad_batch(batch, padded_rows)
    buffer = buffer_size(batch.rollout.mask, parts, shards, buffer)
    how = _How(implementation, parts, buffer, shards, remat)
    return _update((batch, temperature, algorithm), state, optimizer, how)


def minibatches(
    batch: Batch, algorithm: Algorithm, count: int, *, key: PRNGKeyArray
) -> Iterator[Batch]:
    """The rows of a batch in random order, as `count` batches that each make one optimizer step.

    Every minibatch gets weights of its own; advantages and targets stay those of the whole batch.

    Args:
        batch: from `algorithm.assign`.
        algorithm: weighs the minibatches.
        count: how many; must divide the rows.
        key: of the order.

    Raises:
        ValueError: if `count` does not divide the rows.
    """
    rows = batch.weights.shape[0]
    if rows % count:
        raise ValueError(f"count={count} minibatches do not divide {rows} rows; use a divisor")
    if count == 1:
        yield batch
        return
    order = jax.random.permutation(key, rows).reshape(count, -1)
    for index in order:
        yield algorithm.weigh(jax.tree.map(lambda x, index=index: x[index], batch))


def pad_batch(batch: Batch, rows: int) -> Batch:
    """Adds empty rows up to `rows`, which train nothing and change no number; see `pad_rows`."""
    missing = rows - batch.weights.shape[0]
    arrays = (batch.advantages, batch.weights, batch.share, batch.targets, batch.prepared)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, missing), (0, 0)]), arrays)
    return Batch(pad_rows(batch.rollout, rows), *padded)


class _How(NamedTuple):
    """What is fixed when the update is compiled."""

    implementation: Implementation
    parts: int
    buffer: int
    shards: int
    remat: bool


@eqx.filter_jit(donate="all-except-first")
def _update(fixed, state, optimizer, how: _How):
    batch, temperature, algorithm = fixed
    models: Models = (state.policy, state.critic)
    trainable, frozen = eqx.partition(models, eqx.is_inexact_array)

    @eqx.filter_value_and_grad(has_aux=True)
    def loss_of(trainable, part: Batch):
        policy, critic = eqx.combine(trainable, frozen)
        scores = score(
            policy,
            part.rollout,
            critic=critic,
            temperature=temperature,
            implementation=how.implementation,
            buffer=how.buffer,
            shards=how.shards,
            remat=how.remat,
        )
        loss, metrics = algorithm.loss(scores, part)
        return loss, (metrics | _sums(scores, part), _extremes(scores, part))

    def step(carry, part):
        (_, (sums, extremes)), gradient = loss_of(trainable, part)
        old_sums, old_extremes, old_gradient = carry
        return (
            jax.tree.map(jnp.add, old_sums, sums),
            jax.tree.map(jnp.maximum, old_extremes, extremes),
            jax.tree.map(lambda a, g: a + g.astype(a.dtype), old_gradient, gradient),
        ), None

    split_batch = split(batch, how.parts)
    (sums, extremes, gradient), _ = lax.scan(
        step, _start(loss_of, trainable, split_batch), split_batch
    )
    state, norms = _apply(state, trainable, frozen, gradient, optimizer)
    return state, _finish(sums, extremes) | norms


def _start(loss_of, trainable, split_batch):
    """Zeros to add micro-batches to: sums, running maxima, and the gradient in float32 or wider."""
    first = jax.tree.map(lambda x: x[0], split_batch)
    (_, (sums, extremes)), _ = jax.eval_shape(loss_of, trainable, first)
    return (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
        jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), extremes),
        jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), trainable),
    )


def _apply(state: TrainState, trainable, frozen, gradient, optimizer):
    """The optimizer's step, unless a gradient is not finite."""
    # A sum carries any NaN or infinity; a maximum would drop NaN on CPU.
    finite = jnp.isfinite(sum(jnp.sum(jnp.abs(g)) for g in jtu.tree_leaves(gradient)))

    def apply(operand):
        trainable, optimizer_state, gradient = operand
        with jax.numpy_dtype_promotion("standard"):
            change, optimizer_state = optimizer.update(gradient, optimizer_state, trainable)
            new = optax.apply_updates(trainable, change)
        new = jax.tree.map(lambda n, o: n.astype(o.dtype), new, trainable)
        return new, optimizer_state, optax.tree.norm(change)

    def skip(operand):
        trainable, optimizer_state, gradient = operand
        return trainable, optimizer_state, jnp.zeros((), optax.tree.norm(gradient).dtype)

    trainable, optimizer_state, change = lax.cond(
        finite, apply, skip, (trainable, state.optimizer, gradient)
    )
    policy, critic = eqx.combine(trainable, frozen)
    step = finite.astype(jnp.int32)
    new = TrainState(
        policy,
        critic,
        optimizer_state,
        state.algorithm,
        state.updates + step,
        state.skipped + 1 - step,
    )
    norms = {"optim/grad_norm": optax.tree.norm(gradient[0]), "optim/update_norm": change}
    if critic is not None:
        norms["optim/critic_grad_norm"] = optax.tree.norm(gradient[1])
    return new, norms | {"optim/skipped_nonfinite": new.skipped.astype(change.dtype)}


def _sums(scores: Scores, batch: Batch) -> Metrics:
    """Token means that every algorithm logs; contributions of micro-batches add up."""
    rollout = batch.rollout
    delta = lax.stop_gradient(log_ratio(scores, batch))
    old = scores.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    gap = lax.stop_gradient(zero_unmasked(old - rollout.logprobs, rollout.mask))
    weight = jnp.exp(gap)
    return {
        "policy/entropy": batch.mean(scores.entropy),
        "policy/ratio_mean": batch.mean(jnp.exp(delta)),
        "policy/kl_old_k1": batch.mean(-delta),
        "policy/kl_old_k3": batch.mean(jnp.exp(delta) - 1 - delta),
        "mismatch/logp_abs_mean": batch.mean(jnp.abs(gap)),
        "mismatch/kl_k3": batch.mean(weight - 1 - gap),
        "mismatch/weight": batch.mean(weight),
        "mismatch/weight_squared": batch.mean(weight**2),
    }


def _extremes(scores: Scores, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Maxima over tokens; a minimum travels as the maximum of the negative."""
    rollout = batch.rollout
    ratio = jnp.exp(lax.stop_gradient(log_ratio(scores, batch)))
    old = scores.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    gap = lax.stop_gradient(zero_unmasked(old - rollout.logprobs, rollout.mask))
    over = lambda x: jnp.max(jnp.where(rollout.mask, x, -jnp.inf))  # noqa: E731
    return {
        "policy/ratio_max": over(ratio),
        "policy/ratio_min": over(-ratio),
        "mismatch/logp_abs_max": over(jnp.abs(gap)),
        "mismatch/is_weight_max": over(jnp.exp(gap)),
    }


def _finish(sums: Metrics, extremes: dict[str, Any]) -> Metrics:
    """Ratios of means, once the means are complete."""
    metrics = dict(sums)
    mean, squared = metrics.pop("mismatch/weight"), metrics.pop("mismatch/weight_squared")
    metrics["mismatch/is_weight_mean"] = mean
    metrics["mismatch/ess"] = mean**2 / jnp.maximum(squared, jnp.finfo(squared.dtype).tiny)
    metrics |= extremes
    return metrics | {"policy/ratio_min": -extremes["policy/ratio_min"]}
