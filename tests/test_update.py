"""One optimizer step: exact for any split, guarded, and never run for nothing."""

import contextlib
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import close, sampled_rollout, tiny_model

import eqrl
from eqrl import algorithms, models, sharding


ALGORITHMS = {
    "reinforce": algorithms.reinforce(),
    "ppo": algorithms.ppo(),
    "grpo": algorithms.grpo(),
    "rloo": algorithms.rloo(),
    "dapo": algorithms.dapo(max_tokens=8),
    "reinforce++": algorithms.reinforce_pp(),
    "reinforce++-baseline": algorithms.reinforce_pp_baseline(),
    "dr_grpo": algorithms.dr_grpo(max_tokens=8),
}


def _setup(algorithm, optimizer, dtype=jnp.float32, *, old=True):
    """A state, and a batch whose old, reference and sampler log-probs all differ."""
    policy = tiny_model(dtype=dtype)
    critic = None
    if "values" in algorithm.requires:
        critic = models.ValueModel.init(policy)
        critic = eqx.tree_at(
            lambda c: c.weight, critic, jnp.linspace(-1, 1, 16, dtype=critic.weight.dtype)
        )
    state = eqrl.init(policy, algorithm, optimizer, critic=critic)
    rollout = sampled_rollout(0, groups=2, samples=3)
    if old:
        shift = 0.3 * jax.random.normal(jax.random.key(1), rollout.mask.shape, dtype)
        rollout = eqrl.annotate(rollout, frozenset({"old_logprobs"}), policy=policy)
        rollout = dataclasses.replace(rollout, old_logprobs=rollout.need("old_logprobs") + shift)
    rollout = eqrl.annotate(
        rollout, algorithm.requires, reference=tiny_model(jax.random.key(9), dtype=dtype),
        critic=critic, micro_batch=5,
    )  # fmt: skip
    total = jnp.sum(rollout.need("rewards"), axis=1).astype(dtype)
    signal = eqrl.outcome(total, rollout.mask)
    batch, estimators = algorithm.assign(signal, state.algorithm, rollout)
    return dataclasses.replace(state, algorithm=estimators), batch


def _movement(before, after):
    """What SGD at rate 1 subtracted: the gradient."""
    leaves = [jtu.tree_leaves(eqx.filter(s, eqx.is_inexact_array)) for s in (before, after)]
    return [np.asarray(a) - np.asarray(b) for a, b in zip(*leaves, strict=True)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_does_not_depend_on_the_micro_batch(x64, name):
    algorithm, optimizer = ALGORITHMS[name], optax.sgd(1.0)
    gradients, metrics = [], []
    for micro_batch in (None, 1, 2, 4):
        state, batch = _setup(algorithm, optimizer, jnp.float64)
        before = jax.tree.map(jnp.copy, (state.policy, state.critic))
        state, numbers = eqrl.update(state, batch, algorithm, optimizer, micro_batch=micro_batch)
        gradients.append(_movement(before, (state.policy, state.critic)))
        metrics.append({k: float(v) for k, v in numbers.items()})
    assert any(np.abs(leaf).max() > 1e-6 for leaf in gradients[0])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-9, abs=1e-10)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    algorithm, optimizer = algorithms.grpo(kl=0), optax.adam(1e-2)
    state, batch = _setup(algorithm, optimizer)
    bad = dataclasses.replace(batch, advantages=batch.advantages.at[0].set(jnp.nan))
    before = jax.tree.map(lambda x: np.array(x), (state.policy, state.optimizer))
    state, metrics = eqrl.update(state, bad, algorithm, optimizer)
    for a, b in zip(
        jtu.tree_leaves(before), jtu.tree_leaves((state.policy, state.optimizer)), strict=True
    ):
        np.testing.assert_array_equal(a, np.asarray(b))
    assert (int(state.updates), int(state.skipped)) == (0, 1)
    assert float(metrics["optim/skipped_nonfinite"]) == 1
    state, _ = eqrl.update(state, batch, algorithm, optimizer)
    assert (int(state.updates), int(state.skipped)) == (1, 1)


def test_the_starting_policy_survives_donation():
    algorithm, optimizer = algorithms.reinforce(), optax.adam(1e-2)
    policy = tiny_model()
    state = eqrl.init(policy, algorithm, optimizer)
    _, batch = _setup(algorithm, optimizer)
    state, _ = eqrl.update(state, batch, algorithm, optimizer)
    assert np.isfinite(np.asarray(policy.embedding)).all()
    assert np.abs(np.asarray(policy.embedding - state.policy.embedding)).max() > 0


def test_one_compilation_a_shape_bucket():
    algorithm, optimizer = algorithms.reinforce(), optax.sgd(1e-3)
    state, batch = _setup(algorithm, optimizer)
    traces, after_step = [], []

    def counted(hidden, unembedding, targets, **options):
        traces.append(hidden.shape)
        return eqrl.token_logprobs(hidden, unembedding, targets, **options)

    for seed in range(3):
        mask = batch.rollout.mask.at[seed, :].set(False)
        rollout = dataclasses.replace(batch.rollout, mask=mask)
        part = algorithm.weigh(dataclasses.replace(batch, rollout=rollout))
        state, _ = eqrl.update(state, part, algorithm, optimizer, implementation=counted)
        after_step.append(len(traces))
    assert after_step[0] > 0, "the counting implementation was not used"
    assert len(set(after_step)) == 1, "the update was traced again for the same shapes"


def test_minibatches_are_a_partition_with_weights_of_their_own():
    algorithm = algorithms.grpo(kl=0)
    _, batch = _setup(algorithm, optax.sgd(1.0))
    parts = list(eqrl.minibatches(batch, algorithm, 3, key=jax.random.key(0)))
    rows = [tuple(np.asarray(row)) for part in parts for row in part.rollout.logprobs]
    assert sorted(rows) == sorted(tuple(np.asarray(row)) for row in batch.rollout.logprobs)
    for part in parts:
        close(jnp.sum(part.weights), np.float32(1))
    with pytest.raises(ValueError, match="count=5"):
        next(iter(eqrl.minibatches(batch, algorithm, 5, key=jax.random.key(0))))


def test_a_critic_is_refused_where_nothing_reads_it_and_missed_where_something_does():
    policy = tiny_model()
    with pytest.raises(ValueError, match="critic"):
        eqrl.init(policy, algorithms.ppo(), optax.sgd(1.0))
    with pytest.raises(ValueError, match="critic"):
        eqrl.init(policy, algorithms.grpo(), optax.sgd(1.0), critic=models.ValueModel.init(policy))


def test_log_probs_rise_where_the_advantage_is_positive():
    algorithm, optimizer = algorithms.reinforce(), optax.sgd(1e-2)
    state, batch = _setup(algorithm, optimizer, old=False)
    row = int(np.argmax(np.asarray(batch.advantages).max(axis=1)))
    before = np.asarray(eqrl.score(state.policy, batch.rollout).logprobs)[row].sum()
    state, _ = eqrl.update(state, batch, algorithm, optimizer)
    after = np.asarray(eqrl.score(state.policy, batch.rollout).logprobs)[row].sum()
    assert after > before


# --- inside jit -----------------------------------------------------------------------------------


def _on_mesh(axes, state, batch):
    """Both on the mesh, and the context that says so."""
    if axes is None:
        return state, batch, contextlib.nullcontext()
    mesh = sharding.make_mesh(axes)
    state = sharding.place(state, mesh, state.policy.architecture)
    batch = sharding.place_rows(eqrl.pad_batch(batch, 8), mesh)
    return state, batch, jax.set_mesh(mesh)


def _same(a, b):
    found = [jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (a, b)]
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [None, "data=2,fsdp=2,tensor=2"])
def test_the_update_inside_jit_is_that_outside(axes):
    """`buffer=` takes the place of counting; it holds all of 4 rows but their prompts."""
    algorithm, optimizer = algorithms.grpo(), optax.sgd(1e-2, momentum=0.9)
    state, batch, context = _on_mesh(axes, *_setup(algorithm, optimizer))
    sizes = []

    def recorded(hidden, unembedding, targets, **options):
        sizes.append(hidden.shape[0])
        return eqrl.token_logprobs(hidden, unembedding, targets, **options)

    def step(state, batch, buffer):
        return eqrl.update(
            state, batch, algorithm, optimizer, micro_batch=4, buffer=buffer,
            implementation=recorded,
        )  # fmt: skip

    with context:
        inside = jax.jit(step, static_argnums=2)
        got, got_metrics = inside(state, batch, 28)
        assert set(sizes) == {28}, "the buffer is not the one given"
        with pytest.raises(ValueError, match="buffer= must be given inside jit, where tokens"):
            inside(state, batch, None)
        # Last: it donates the state.
        want, metrics = step(state, batch, None)
    assert max(sizes) == 4 * 9, "outside, tokens were not counted"
    assert int(got.updates) == 1 and float(metrics["optim/update_norm"]) > 1e-4
    _same(got, want)
    _same(got_metrics, metrics)


@pytest.mark.parametrize("axes", [None, "data=2,fsdp=2,tensor=2"])
def test_annotations_inside_jit_are_those_outside(axes):
    algorithm = algorithms.ppo()
    state, batch, context = _on_mesh(axes, *_setup(algorithm, optax.sgd(1.0)))
    empty = {"old_logprobs": None, "ref_logprobs": None, "values": None}
    rollout = dataclasses.replace(batch.rollout, **empty)

    def fill(state, rollout, buffer):
        return eqrl.annotate(
            rollout, frozenset({*empty, "sum_pi_squared"}), policy=state.policy,
            reference=state.policy, critic=state.critic, micro_batch=4, buffer=buffer,
        )  # fmt: skip

    with context:
        inside = jax.jit(fill, static_argnums=2)
        got, want = inside(state, rollout, 28), fill(state, rollout, None)
        with pytest.raises(ValueError, match="buffer= must be given inside jit, where tokens"):
            inside(state, rollout, None)
    for name in (*empty, "sum_pi_squared"):
        assert np.abs(np.asarray(got.need(name))).max() > 0.01, name
    _same(got, want)
