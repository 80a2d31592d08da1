"""The named algorithms: their wiring, their whole loss by NumPy loops, and that no two agree."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from eqrl import _advantages as signals, _losses as losses, algorithms
from eqrl._losses.base import term
from eqrl._select import drop_constant_groups, drop_truncated
from eqrl._select.base import apply
from eqrl._transform import stateless
from eqrl._types import Batch, Scores
from eqrl.algorithms import Algorithm


LIMIT = 8  # tokens: no row of a `world` is longer

SIX = {
    "reinforce": algorithms.reinforce,
    "ppo": algorithms.ppo,
    "grpo": algorithms.grpo,
    "rloo": algorithms.rloo,
    "dapo": lambda: algorithms.dapo(LIMIT),
    "reinforce++": algorithms.reinforce_pp,
}
WITHOUT_KL = SIX | {
    "ppo": lambda: algorithms.ppo(kl=0.0),
    "grpo": lambda: algorithms.grpo(kl=0.0),
    "rloo": lambda: algorithms.rloo(kl=0.0),
    "dapo": lambda: algorithms.dapo(LIMIT, penalty=0.0),
    "reinforce++": lambda: algorithms.reinforce_pp(kl=0.0),
}
ALL = SIX | {
    "dr_grpo": lambda: algorithms.dr_grpo(LIMIT),
    "reinforce++-baseline": algorithms.reinforce_pp_baseline,
}
by_name = pytest.mark.parametrize("name", ALL)


def graded_world(seed=0, *, on_policy=False):
    """A signal whose reward stands on last tokens, a rollout, and scores of the policy trained."""
    _, rollout = oracles.world(seed)
    scores, _ = oracles.loss_world(seed)
    total = jnp.sum(rollout.need("rewards"), axis=1)
    signal = jnp.asarray(oracles.shift(jnp.zeros_like(scores.logprobs), rollout, 1.0))
    if on_policy:
        rollout = dataclasses.replace(rollout, old_logprobs=scores.logprobs)
    return signal * total[:, None], rollout, scores


def gradient(algorithm, signal, rollout, scores):
    """Gradients of the loss wrt log-probs, entropy and values, flat."""
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    found = jax.grad(lambda scores: algorithm.loss(scores, batch)[0])(scores)
    return jnp.concatenate([x.ravel() for x in (found.logprobs, found.entropy, found.values)])


# --- the six differ -------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
def test_no_two_algorithms_give_the_same_gradient(kl, on_policy, x64):
    signal, rollout, scores = graded_world(on_policy=on_policy)
    table = SIX if kl else WITHOUT_KL
    policy_part = scores.logprobs.size
    found = {name: gradient(make(), signal, rollout, scores) for name, make in table.items()}
    for a, b in itertools.combinations(found, 2):
        first, second = found[a][:policy_part], found[b][:policy_part]
        cosine = jnp.dot(first, second) / jnp.linalg.norm(first) / jnp.linalg.norm(second)
        # Not even up to a factor, which an optimizer such as Adam would hide.
        assert float(cosine) < 0.999, (a, b, float(cosine))


def test_one_epoch_of_ppo_is_not_reinforce(x64):
    # A bug of the predecessor: with one epoch both trained the same, to the last digit.
    signal, rollout, scores = graded_world(on_policy=True)
    size = scores.logprobs.size
    ppo = gradient(algorithms.ppo(kl=0.0), signal, rollout, scores)
    plain = gradient(algorithms.reinforce(), signal, rollout, scores)
    assert float(jnp.linalg.norm(ppo[:size] - plain[:size])) > 0.1 * float(jnp.linalg.norm(plain))
    assert np.any(np.asarray(ppo[2 * size :]) != 0)  # the critic learns
    assert np.all(np.asarray(plain[2 * size :]) == 0)


# --- wiring ---------------------------------------------------------------------------------------

WIRING = {
    "reinforce": ("batch_center()", "reinforce()", "sequence_sum()"),
    "rloo": ("kl_penalty(0.05) | rloo()", "reinforce()", "sequence_sum()"),
    "grpo": ("group_norm()", "clipped() + 0.04 * kl()", "sequence_mean()"),
    "dr_grpo": ("group_center()", "clipped()", "constant_length(8)"),
    "dapo": ("overlong(8, 2) | group_norm()", "clipped(high=0.28)", "token_mean()"),
    "reinforce++": ("kl_penalty(0.01) | returns() | whiten()", "clipped()", "token_mean()"),
    "reinforce++-baseline": (
        "group_center() | kl_penalty(0.01) | whiten()",
        "clipped()",
        "token_mean()",
    ),
    "ppo": (
        "kl_penalty(0.05) | gae() | whiten()",
        "clipped() + 0.5 * value_loss()",
        "token_mean()",
    ),
}


@by_name
def test_wiring(name):
    algorithm = ALL[name]()
    parts = (algorithm.advantage, algorithm.objective, algorithm.weighting)
    assert tuple(map(repr, parts)) == WIRING[name]
    selection = "drop_constant_groups()" if name == "dapo" else "None"
    target = "kl_penalty(0.05) | gae() | add_values()" if name == "ppo" else "None"
    assert (repr(algorithm.selection), repr(algorithm.target)) == (selection, target)
    for part in parts:
        assert repr(part) in repr(algorithm)
    assert algorithm == ALL[name]()


@by_name
def test_requires_and_groups(name):
    algorithm = ALL[name]()
    free = name in ("reinforce", "dr_grpo", "dapo")
    expected = set() if free else {"ref_logprobs"}
    assert algorithm.requires == (expected | {"values"} if name == "ppo" else expected)
    grouped = name in ("rloo", "grpo", "dr_grpo", "dapo", "reinforce++-baseline")
    assert algorithm.min_group == (2 if grouped else 1)
    if grouped:
        with pytest.raises(ValueError, match="at least 2 per prompt but gets 1"):
            algorithm.check_groups(1)
    algorithm.check_groups(algorithm.min_group)


def test_zero_leaves_a_part_and_its_requirement_out():
    for name in SIX:
        assert "ref_logprobs" not in WITHOUT_KL[name]().requires
    assert repr(algorithms.rloo(0.0).advantage) == "rloo()"
    assert repr(algorithms.grpo(kl=0.0).objective) == "clipped()"
    assert repr(algorithms.reinforce_pp(0.0).advantage) == "returns() | whiten()"
    assert repr(algorithms.reinforce_pp_baseline(0.0).advantage) == "group_center() | whiten()"
    assert repr(algorithms.dapo(8, penalty=0.0).advantage) == "group_norm()"
    assert repr(algorithms.dapo(8, buffer=0).advantage) == "group_norm()"
    ppo = algorithms.ppo(0.0, value_clip=0.0, value_coef=0.25)
    assert repr(ppo.objective) == "clipped() + 0.25 * value_loss(clip=None)"
    assert repr(ppo.target) == "gae() | add_values()"
    assert repr(algorithms.ppo(value_coef=0.0).objective) == "clipped()"


def test_arguments_arrive():
    assert repr(algorithms.grpo(0.1, 0.5).objective) == "clipped(low=0.1, high=0.1) + 0.5 * kl()"
    dapo = algorithms.dapo(20480, low=0.1, high=0.3, buffer=4096, penalty=0.5)
    assert repr(dapo.advantage) == "overlong(20480, 4096, penalty=0.5) | group_norm()"
    assert repr(dapo.objective) == "clipped(low=0.1, high=0.3)"
    assert repr(algorithms.dr_grpo(99, 0.1).weighting) == "constant_length(99)"
    plus = algorithms.reinforce_pp(0.1, 0.9, 0.3)
    assert repr(plus.advantage) == "kl_penalty(0.1) | returns(gamma=0.9) | whiten()"
    ppo = algorithms.ppo(0.1, 0.9, 0.8, 0.3, 0.4, 0.6)
    assert repr(ppo.advantage) == "kl_penalty(0.1) | gae(gamma=0.9, lam=0.8) | whiten()"
    assert repr(ppo.objective) == "clipped(low=0.3, high=0.3) + 0.6 * value_loss(clip=0.4)"


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: algorithms.rloo(-0.1), "kl=-0.1"),
        (lambda: algorithms.grpo(kl=-0.1), "kl=-0.1"),
        (lambda: algorithms.reinforce_pp_baseline(float("nan")), "kl=nan"),
        (lambda: algorithms.ppo(value_coef=-1.0), "value_coef=-1.0"),
        (lambda: algorithms.dapo(8, buffer=-1), "buffer=-1"),
        (lambda: algorithms.dapo(8, buffer=9), "buffer=9"),
        (lambda: algorithms.dr_grpo(0), "length=0"),
    ],
)
def test_impossible_arguments_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} "):
        build()


# --- the whole loss, once more in NumPy -----------------------------------------------------------


def expected_loss(name, signal, rollout, scores):
    """Each algorithm's loss from the oracles alone."""

    def batch_of(advantages, targets=None):
        return Batch(rollout, jnp.asarray(advantages), rollout.values, rollout.values, targets)

    def penalised(coef):
        return oracles.kl_penalty(signal, rollout, coef)

    mask = rollout.mask
    match name:
        case "reinforce":
            batch = batch_of(oracles.batch_center(signal, rollout))
            return oracles.reinforce(scores, batch), oracles.sequence_sum(mask)
        case "rloo":
            batch = batch_of(oracles.rloo(penalised(0.05), rollout))
            return oracles.reinforce(scores, batch), oracles.sequence_sum(mask)
        case "grpo":
            batch = batch_of(oracles.group_norm(signal, rollout))
            value = oracles.clipped(scores, batch) + 0.04 * oracles.kl(scores, batch)
            return value, oracles.sequence_mean(mask)
        case "dr_grpo":
            batch = batch_of(oracles.group_center(signal, rollout))
            return oracles.clipped(scores, batch), oracles.constant_length(mask, LIMIT)
        case "dapo":
            shaped = oracles.overlong(signal, rollout, LIMIT, 2)
            batch = batch_of(oracles.group_norm(shaped, rollout))
            return oracles.clipped(scores, batch, 0.2, 0.28), oracles.token_mean(mask)
        case "reinforce++":
            togo = oracles.returns(penalised(0.01), rollout)
            batch = batch_of(oracles.whiten(togo, rollout))
            return oracles.clipped(scores, batch), oracles.token_mean(mask)
        case "reinforce++-baseline":
            shaped = oracles.kl_penalty(oracles.group_center(signal, rollout), rollout, 0.01)
            batch = batch_of(oracles.whiten(shaped, rollout))
            return oracles.clipped(scores, batch), oracles.token_mean(mask)
        case "ppo":
            advantages = oracles.gae(penalised(0.05), rollout)
            targets = jnp.asarray(oracles.add_values(advantages, rollout))
            batch = batch_of(oracles.whiten(advantages, rollout), targets)
            value = oracles.clipped(scores, batch) + 0.5 * oracles.value_loss(scores, batch)
            return value, oracles.token_mean(mask)
    raise ValueError(name)


@by_name
@pytest.mark.parametrize("seed", [0, 1])
def test_whole_loss_equals_the_loops(name, seed, x64):
    signal, rollout, scores = graded_world(seed)
    algorithm = ALL[name]()
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    loss, metrics = algorithm.loss(scores, batch)
    value, weights = expected_loss(name, signal, algorithm.select(rollout), scores)
    np.testing.assert_allclose(loss, np.sum(weights * value), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(metrics["loss/total"], loss)


@by_name
def test_any_split_gives_the_same_gradient(name, x64):
    signal, rollout, scores = graded_world()
    algorithm = ALL[name]()
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    grade = jax.grad(algorithm.loss, has_aux=True)
    whole, metrics = grade(scores, batch)
    sums = jax.tree.map(jnp.zeros_like, metrics)
    for rows in (np.arange(0, 3), np.arange(3, 4), np.arange(4, 11)):
        part, part_metrics = grade(*jax.tree.map(lambda x: x[rows], (scores, batch)))  # noqa: B023
        expected = jax.tree.map(lambda x: x[rows], whole)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), part, expected)
        sums = jax.tree.map(jnp.add, sums, part_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), sums, metrics)


# --- assign, weigh, select ------------------------------------------------------------------------


@by_name
def test_batch_is_ready_for_a_loss(name):
    signal, rollout, _ = graded_world()
    algorithm = ALL[name]()
    noisy = jnp.where(rollout.mask, signal, jnp.nan)
    batch, state = jax.jit(algorithm.assign)(noisy, algorithm.init(), rollout)
    off = ~np.asarray(batch.rollout.mask)
    targets = () if batch.targets is None else (batch.targets,)
    assert len(targets) == (name == "ppo")
    for x in (batch.advantages, batch.weights, batch.share, *targets):
        assert x.dtype == signal.dtype and np.all(np.asarray(x)[off] == 0)
        assert np.all(np.isfinite(x)) and np.any(np.asarray(x) != 0)
    np.testing.assert_allclose(jnp.sum(batch.share), 1.0, rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(algorithm.init())


def test_no_gradient_flows_through_a_batch():
    signal, rollout, _ = graded_world()
    algorithm = algorithms.ppo()

    def total(signal, values):
        changed = dataclasses.replace(rollout, values=values)
        batch, _ = algorithm.assign(signal, algorithm.init(), changed)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves((batch.advantages, batch.targets)))

    for x in jax.grad(total, (0, 1))(signal, rollout.values):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_state_is_kept_between_batches():
    signal, rollout, _ = graded_world()
    advantage = signals.ema_baseline()
    algorithm = Algorithm(advantage, losses.reinforce(), losses.sequence_sum())
    first, state = algorithm.assign(signal, algorithm.init(), rollout)
    second, state = algorithm.assign(signal, state, rollout)
    expected = oracles.ema_baseline([signal] * 2, [rollout] * 2)
    np.testing.assert_allclose(first.advantages, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second.advantages, expected[1], rtol=1e-5, atol=1e-6)
    assert int(state[0].count) == 2


def test_a_minibatch_is_weighed_anew():
    signal, rollout, _ = graded_world()
    algorithm = algorithms.ppo()
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    part = jax.tree.map(lambda x: x[np.array([0, 1, 5])], batch)
    weighed = algorithm.weigh(part)
    mask = part.rollout.mask
    np.testing.assert_allclose(weighed.weights, oracles.token_mean(mask), rtol=1e-6)
    np.testing.assert_allclose(weighed.share, oracles.token_mean(mask), rtol=1e-6)
    np.testing.assert_array_equal(weighed.advantages, part.advantages)
    np.testing.assert_array_equal(weighed.targets, part.targets)
    assert float(jnp.sum(part.weights)) < 0.9


def test_selection_precedes_every_statistic():
    signal, rollout, scores = graded_world()
    rewards = rollout.need("rewards").at[4].set(0.0)
    rewards = jnp.where((rollout.group == 3)[:, None], 7.41, rewards)
    rollout = dataclasses.replace(rollout, rewards=rewards)
    algorithm = algorithms.dapo(LIMIT)
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    keep = np.asarray(drop_constant_groups()(rollout))
    assert 0 < keep.sum() < 9 and not keep[np.asarray(rollout.group) == 3].any()
    expected = np.asarray(rollout.mask) & keep[:, None]
    np.testing.assert_array_equal(batch.rollout.mask, expected)
    np.testing.assert_allclose(batch.weights, expected / expected.sum(), rtol=1e-6)
    # A script that selects for itself, to refill the batch, gets the same.
    again, _ = algorithm.assign(signal, algorithm.init(), apply(rollout, jnp.asarray(keep)))
    jax.tree.map(np.testing.assert_array_equal, again, batch)


def test_a_batch_without_signal_has_no_gradient():
    # All groups constant: DAPO drops all, the others have advantage exactly 0.
    _, rollout, scores = graded_world(on_policy=True)
    signal = jnp.asarray(oracles.shift(jnp.zeros_like(scores.logprobs), rollout, 7.41))
    rollout = dataclasses.replace(rollout, rewards=jnp.full((11, 2), 7.41))
    for make in (WITHOUT_KL[name] for name in ("reinforce", "grpo", "rloo", "dapo")):
        assert np.all(np.asarray(gradient(make(), signal, rollout, scores)) == 0)


def test_an_algorithm_is_a_pytree_argument():
    signal, rollout, scores = graded_world()

    @jax.jit
    def loss(algorithm: Algorithm, scores: Scores):
        batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
        return algorithm.loss(scores, batch)[0]

    for name in ALL:
        algorithm = ALL[name]()
        batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
        np.testing.assert_allclose(
            loss(algorithm, scores), algorithm.loss(scores, batch)[0], rtol=1e-5, atol=1e-6
        )


def test_an_advantage_that_stays_on_last_tokens_is_refused():
    objective, weighting = losses.reinforce(), losses.token_mean()
    for advantage in (signals.gdpo(), signals.component(0), signals.rloo() | signals.as_score()):
        with pytest.raises(ValueError, match="only last tokens would train"):
            Algorithm(advantage, objective, weighting)
    Algorithm(signals.gdpo() | signals.returns(), objective, weighting)
    Algorithm(signals.rloo() | signals.as_score() | signals.batch_norm(), objective, weighting)


def test_what_is_prepared_has_the_shape_of_the_mask():
    def fn(scores, batch):
        return -batch.advantages, {}

    wrong = term(fn, prepare=lambda batch: jnp.sum(batch.advantages))
    algorithm = Algorithm(signals.batch_center(), wrong, losses.token_mean())
    signal, rollout, _ = graded_world()
    with pytest.raises(ValueError, match=r"prepared an array of shape \(\).*\(11, 8\)"):
        algorithm.assign(signal, algorithm.init(), rollout)


def test_group_rules_stand_last():
    # Three right, one wrong but cut off: without the last the group teaches nothing.
    _, rollout, _ = graded_world()
    rollout = jax.tree.map(lambda x: x[:4], rollout)
    rollout = dataclasses.replace(
        rollout,
        mask=jnp.ones_like(rollout.mask),
        group=jnp.zeros(4, jnp.int32),
        truncated=jnp.arange(4) == 3,
        rewards=jnp.asarray([[1.0], [1.0], [1.0], [0.0]]),
    )
    rows_first = drop_truncated() & drop_constant_groups()
    assert not np.any(rows_first(rollout))
    group_first = drop_constant_groups() & drop_truncated()
    np.testing.assert_array_equal(group_first(rollout), [True, True, True, False])
    algorithm = dataclasses.replace(algorithms.grpo(), selection=rows_first)
    once = algorithm.select(rollout)
    np.testing.assert_array_equal(algorithm.select(once).mask, once.mask)


def test_what_a_users_estimator_leaves_on_unmasked_positions_goes_nowhere():
    def careless(signal, rollout):
        return signal + jnp.where(rollout.mask, 0.0, jnp.nan)

    signal, rollout, scores = graded_world()
    algorithm = Algorithm(stateless(careless), losses.reinforce(), losses.token_mean())
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    assert np.all(np.asarray(batch.advantages)[~np.asarray(rollout.mask)] == 0)
    assert np.isfinite(algorithm.loss(scores, batch)[0])
