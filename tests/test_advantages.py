"""Each estimator against a NumPy loop, published golden values, and what the formulas imply."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from eqrl import _advantages as signals
from eqrl._checks import check_number
from eqrl._transform import Stateless, check_groups, stateless
from eqrl._types import Rollout


def run(transform, signal, rollout):
    return transform.update(signal, transform.init(), rollout)[0]


def one_token_rows(scores, group=None, dtype=float):
    """Each score on its own row of one token; one group unless told otherwise."""
    n = len(scores)
    rollout = Rollout(
        tokens=jnp.zeros((n, 1), jnp.int32),
        mask=jnp.ones((n, 1), bool),
        positions=jnp.zeros((n, 1), jnp.int32),
        logprobs=jnp.zeros((n, 1), dtype),
        group=jnp.zeros(n, jnp.int32) if group is None else jnp.asarray(group, jnp.int32),
        truncated=jnp.zeros(n, bool),
    )
    return jnp.asarray(scores, dtype)[:, None], rollout


def one_row(signal, mask, **fields):
    """A single row of tokens."""
    signal = jnp.asarray(signal, float)[None]
    rollout = Rollout(
        tokens=jnp.zeros(signal.shape, jnp.int32),
        mask=jnp.asarray(mask, bool)[None],
        positions=jnp.zeros(signal.shape, jnp.int32),
        logprobs=jnp.asarray(fields.pop("logprobs", jnp.zeros(signal.shape[1])))[None],
        group=jnp.zeros(1, jnp.int32),
        truncated=jnp.zeros(1, bool),
        **{name: jnp.asarray(x, float)[None] for name, x in fields.items()},
    )
    return signal, rollout


ORACLES = [
    ("group_norm", {}),
    ("group_norm", {"ddof": 0, "eps": 0.3}),
    ("group_center", {}),
    ("rloo", {}),
    ("batch_norm", {}),
    ("batch_norm", {"ddof": 0, "eps": 0.3}),
    ("batch_center", {}),
    ("whiten", {}),
    ("whiten", {"ddof": 0, "eps": 0.3}),
    ("returns", {}),
    ("returns", {"gamma": 0.7}),
    ("gae", {}),
    ("gae", {"gamma": 0.9, "lam": 0.6}),
    ("add_values", {}),
    ("kl_penalty", {"coef": 0.3}),
    ("kl_penalty", {"coef": 0.3, "estimator": "k2"}),
    ("kl_penalty", {"coef": 0.3, "estimator": "k3"}),
    ("overlong", {"max_tokens": 6, "buffer": 4}),
    ("overlong", {"max_tokens": 4, "buffer": 2, "penalty": 0.5}),
    ("clip", {"limit": 0.5}),
    ("scale", {"factor": -1.5}),
    ("shift", {"offset": 0.7}),
]


@pytest.mark.parametrize("name, arguments", ORACLES)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(name, arguments, seed, x64):
    signal, rollout = oracles.world(seed)
    out = run(getattr(signals, name)(**arguments), signal, rollout)
    expected = getattr(oracles, name)(signal, rollout, **arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_ema_baseline_equals_the_loop(x64):
    worlds = [oracles.world(seed) for seed in range(4)]
    transform = signals.ema_baseline(0.8)
    state, out = transform.init(), []
    for signal, rollout in worlds:
        advantage, state = transform.update(signal, state, rollout)
        out.append(advantage)
    expected = oracles.ema_baseline(*zip(*worlds, strict=True), decay=0.8)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    assert int(state.count) == 4


def test_ema_baseline_forgets_nothing_over_an_empty_batch():
    signal, rollout = oracles.world()
    transform = signals.ema_baseline()
    _, state = transform.update(signal, transform.init(), rollout)
    empty = dataclasses.replace(rollout, mask=jnp.zeros_like(rollout.mask))
    _, after = transform.update(signal, state, empty)
    assert after == state


def test_kl_penalty_reads_the_samplers_logprobs_without_old_ones(x64):
    signal, rollout = oracles.world()
    rollout = dataclasses.replace(rollout, old_logprobs=None)
    out = run(signals.kl_penalty(0.3), signal, rollout)
    expected = oracles.kl_penalty(signal, rollout, 0.3)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


# --- golden values of reference/algorithms.md, Appendix A (printed to six digits) -----------------


@pytest.mark.parametrize(
    "transform, expected",
    [
        (signals.group_norm(), [1.095443, -0.730295, -0.730295, 1.095443, -0.730295]),
        (signals.group_norm(eps=1e-4), [1.095245, -0.730163, -0.730163, 1.095245, -0.730163]),
        (signals.group_norm(ddof=0), [1.224742, -0.816495, -0.816495, 1.224742, -0.816495]),
        (signals.group_center(), [0.6, -0.4, -0.4, 0.6, -0.4]),
        (signals.rloo(), [0.75, -0.5, -0.5, 0.75, -0.5]),
    ],
    ids=repr,
)
def test_golden_groups(transform, expected, x64):
    signal, rollout = one_token_rows([1, 0, 0, 1, 0])
    np.testing.assert_allclose(run(transform, signal, rollout)[:, 0], expected, atol=5e-7)


def test_golden_one_of_five_right(x64):
    signal, rollout = one_token_rows([1, 0, 0, 0, 0])
    out = run(signals.group_norm(), signal, rollout)[:2, 0]
    np.testing.assert_allclose(out, [1.78885, -0.447213], atol=1e-6)


GAP = [1, 1, 0, 1, 1, 0]
VALUES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    "gamma, lam, advantage, target",
    [
        (1.0, 1.0, [0.9, 0.8, 0, 0.6, 0.5, 0], [1, 1, 0, 1, 1, 0]),
        (
            1.0,
            0.95,
            [0.808937, 0.74625, 0, 0.575, 0.5, 0],
            [0.908937, 0.94625, 0, 0.975, 1, 0],
        ),
        (
            0.99,
            0.95,
            [0.782324, 0.727618, 0, 0.56525, 0.5, 0],
            [0.882324, 0.927618, 0, 0.96525, 1, 0],
        ),
    ],
)
def test_golden_gae_carries_over_a_gap(gamma, lam, advantage, target, x64):
    signal, rollout = one_row([0, 0, 0, 0, 1, 0], GAP, values=VALUES)
    estimate = signals.gae(gamma, lam)
    np.testing.assert_allclose(run(estimate, signal, rollout)[0], advantage, atol=1e-6)
    out = run(estimate | signals.add_values(), signal, rollout)[0]
    np.testing.assert_allclose(out, target, atol=1e-6)


@pytest.mark.parametrize(
    "ddof, expected",
    [
        (1, [1.049517, 0.614935, 0, -0.572257, -1.092195, 0]),
        (0, [1.211878, 0.710066, 0, -0.660786, -1.261158, 0]),
    ],
)
def test_golden_whiten(ddof, expected, x64):
    signal, rollout = one_row([0, 0, 0, 0, 1, 0], GAP, values=VALUES)
    transform = signals.gae(1.0, 0.95) | signals.whiten(ddof=ddof)
    np.testing.assert_allclose(run(transform, signal, rollout)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "gamma, expected",
    [
        (1.0, [0.9975, 0.9985, 0, 0.9965, 0.997, 0]),
        (0.9, [0.727208, 0.80912, 0, 0.8968, 0.997, 0]),
    ],
)
def test_golden_reinforce_pp(gamma, expected, x64):
    kl = [0.1, -0.2, 0, 0.05, 0.3, 0]
    signal, rollout = one_row([0, 0, 0, 0, 1, 0], GAP, logprobs=kl, ref_logprobs=[0.0] * 6)
    shaped = signals.kl_penalty(0.01)
    reward = [-0.001, 0.002, 0, -0.0005, 0.997, 0]
    np.testing.assert_allclose(run(shaped, signal, rollout)[0], reward, atol=1e-12)
    out = run(shaped | signals.returns(gamma), signal, rollout)[0]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_golden_reinforce_pp_baseline(x64):
    kl = [0.1, -0.2, 0, 0.05, 0.3, 0]
    signal, rollout = one_row([0.6] * 6, GAP, logprobs=kl, ref_logprobs=[0.0] * 6)
    out = run(signals.kl_penalty(0.01), signal, rollout)[0]
    np.testing.assert_allclose(out, [0.599, 0.602, 0, 0.5995, 0.597, 0], atol=1e-12)


def test_golden_kl_estimators(x64):
    d = [0.5, -0.5, 0, 3, -3]
    expected = {
        "k1": d,
        "k2": [0.125, 0.125, 0, 4.5, 4.5],
        "k3": [0.106531, 0.148721, 0, 2.049787, 16.085537],
    }
    for estimator, cost in expected.items():
        signal, rollout = one_row([0.0] * 5, [1] * 5, logprobs=d, ref_logprobs=[0.0] * 5)
        out = run(signals.kl_penalty(1.0, estimator=estimator), signal, rollout)[0]
        np.testing.assert_allclose(-out, cost, atol=1e-6)


@pytest.mark.parametrize("length, expected", [(90, 0), (100, 0), (110, -0.5), (120, -1), (130, -1)])
def test_golden_overlong(length, expected, x64):
    mask = np.arange(140) < length
    out = run(signals.overlong(120, 20), *one_row(np.zeros(140), mask))[0]
    np.testing.assert_allclose(out[length - 1], expected, atol=1e-12)
    assert np.count_nonzero(out) == (expected != 0)


# --- what the formulas imply ----------------------------------------------------------------------


def live_scores(seed=3):
    """Scores of ten live one-token rows in groups of 2, 3, 5."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(10), np.array([4, 4, 0, 0, 0, 8, 8, 8, 8, 8])


@pytest.mark.parametrize("name", ["group_norm", "group_center", "rloo"])
def test_groups_sum_to_zero_and_ignore_shifts(name, x64):
    scores, group = live_scores()
    transform = getattr(signals, name)()
    out = run(transform, *one_token_rows(scores, group))[:, 0]
    for g in np.unique(group):
        np.testing.assert_allclose(np.sum(out[group == g]), 0, atol=1e-13)
    shifted = run(transform, *one_token_rows(scores + 3.0 * group, group))[:, 0]
    np.testing.assert_allclose(shifted, out, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_norm", "batch_center", "whiten"])
def test_batch_statistics_ignore_one_shift(name, x64):
    scores, group = live_scores()
    transform = getattr(signals, name)()
    out = run(transform, *one_token_rows(scores, group))
    np.testing.assert_allclose(run(transform, *one_token_rows(scores + 7, group)), out, atol=1e-12)
    np.testing.assert_allclose(jnp.sum(out), 0, atol=1e-12)


def test_scale(x64):
    scores, group = live_scores()
    for name, factor in (("group_norm", 1.0), ("rloo", 5.0), ("group_center", 5.0)):
        transform = getattr(signals, name)()
        out = run(transform, *one_token_rows(scores, group))
        scaled = run(transform, *one_token_rows(5 * scores, group))
        np.testing.assert_allclose(scaled, factor * out, rtol=2e-5)


def test_rloo_is_group_center_without_itself(x64):
    scores, group = live_scores()
    size = np.array([np.sum(group == g) for g in group])[:, None]
    center = run(signals.group_center(), *one_token_rows(scores, group))
    out = run(signals.rloo(), *one_token_rows(scores, group))
    np.testing.assert_allclose(out, size / (size - 1) * center, rtol=1e-12)


def test_gae_limits(x64):
    signal, rollout = oracles.world()
    for gamma in (1.0, 0.9):
        targets = run(signals.gae(gamma, 1.0) | signals.add_values(), signal, rollout)
        togo = run(signals.returns(gamma), signal, rollout)
        np.testing.assert_allclose(targets, togo, rtol=1e-12, atol=1e-12)
        step = oracles.gae(signal, rollout, gamma, 0.0)
        np.testing.assert_allclose(run(signals.gae(gamma, 0.0), signal, rollout), step, atol=1e-12)


def test_returns_over_a_long_row(x64):
    rng = np.random.default_rng(0)
    signal, rollout = one_row(rng.standard_normal(1025), rng.random(1025) < 0.7)
    out = run(signals.returns(0.97), signal, rollout)
    np.testing.assert_allclose(out, oracles.returns(signal, rollout, 0.97), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "transform", [signals.group_norm(eps=1e-9), signals.group_center(), signals.rloo()], ids=repr
)
def test_constant_groups_are_exactly_zero_beside_others(transform):
    # Trap 32: without the first row's subtraction 15 times 7.41 gives advantages near 1.
    compiled = jax.jit(transform)
    for size in range(2, 17):
        scores = np.r_[np.full(16, 7.41), 0.0, 1.0, np.full(16, 0.3)]
        group = np.r_[np.zeros(16), 1, 1, np.full(16, 2)]
        live = np.r_[np.arange(16) < size, True, True, np.arange(16) < size]
        signal, rollout = one_token_rows(scores, group, jnp.float32)
        rollout = dataclasses.replace(rollout, mask=jnp.asarray(live)[:, None])
        out = np.asarray(compiled(signal, rollout))[:, 0]
        np.testing.assert_array_equal(out[group != 1], 0)
        assert np.all(out[group == 1] != 0)


# --- groups of one --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["group_norm", "group_center", "rloo"])
def test_groups_of_one(name):
    transform = getattr(signals, name)()
    signal, rollout = one_token_rows([1.0, 2.0, 5.0], [0, 0, 2])
    with pytest.raises(ValueError, match=rf"`{name}\(\)` compares .* group 2 .* at least 2"):
        transform(signal, rollout)
    with pytest.raises(ValueError, match="group 2"):
        (signals.clip(9.0) | transform).update(signal, (None, None), rollout)
    out = jax.jit(transform)(signal, rollout)
    assert float(out[2, 0]) == 0 and np.all(np.isfinite(out))
    assert np.all(np.asarray(out[:2]) != 0)


@pytest.mark.parametrize("name", ["group_norm", "group_center", "rloo"])
def test_the_only_live_row_of_a_group_gets_zero(name):
    # Its group has two rows, one of them empty: nothing to refuse, nothing to learn.
    transform = getattr(signals, name)()
    signal, rollout = one_token_rows([1.0, 2.0, 5.0, 6.0], [0, 0, 2, 2])
    rollout = dataclasses.replace(rollout, mask=rollout.mask.at[3].set(False))
    out = transform(signal, rollout)
    np.testing.assert_array_equal(out[2:], 0)
    assert np.all(np.asarray(out[:2]) != 0)


def test_an_empty_row_alone_in_its_group_is_padding():
    signal, rollout = one_token_rows([1.0, 2.0, 5.0], [0, 0, 2])
    rollout = dataclasses.replace(rollout, mask=rollout.mask.at[2].set(False))
    assert float(signals.rloo()(signal, rollout)[2, 0]) == 0


def test_too_few_samples_are_refused_by_name():
    chain = signals.kl_penalty(0.1) | (0.5 * signals.group_norm() + signals.batch_norm())
    assert chain.min_group == 2
    with pytest.raises(ValueError, match=r"`group_norm\(\)` .* at least 2 .* gets 1"):
        check_groups(chain, 1)
    check_groups(chain, 2)
    check_groups(signals.batch_center() | signals.clip(1.0), 1)
    assert (signals.returns() | signals.whiten()).min_group == 1


# --- composition and refusals ---------------------------------------------------------------------


def test_chain_applies_left_to_right_and_sum_adds(x64):
    signal, rollout = oracles.world()
    chain = signals.group_norm() + 0.2 * signals.batch_norm() | signals.clip(0.8)
    both = oracles.group_norm(signal, rollout) + 0.2 * oracles.batch_norm(signal, rollout)
    expected = oracles.clip(both, rollout, 0.8)
    np.testing.assert_allclose(chain(signal, rollout), expected, rtol=1e-12, atol=1e-12)


def test_requires_takes_the_union():
    chain = signals.kl_penalty(0.1) | signals.gae() + signals.returns() | signals.whiten()
    assert chain.requires == {"ref_logprobs", "values"}
    assert signals.whiten().requires == frozenset()


@pytest.mark.parametrize(
    "build",
    [
        lambda: signals.rloo() | signals.group_norm(),
        lambda: signals.group_center() | signals.clip(1.0) | signals.returns(),
        lambda: signals.whiten() | signals.batch_center(),
        lambda: signals.gae() | signals.overlong(8, 4),
        lambda: signals.clip(1.0) + signals.rloo() | signals.shift(1.0),
        lambda: 2.0 * signals.rloo() | signals.ema_baseline(),
    ],
)
def test_a_total_of_something_spread_is_refused(build):
    with pytest.raises(ValueError, match="already spread the signal over tokens"):
        build()


def test_state_travels_through_compositions(x64):
    signal, rollout = oracles.world()
    chain = signals.clip(5.0) | (signals.rloo() + 0.5 * signals.ema_baseline())
    state = chain.init()
    first, state = chain.update(signal, state, rollout)
    second, state = chain.update(signal, state, rollout)
    worlds = [[signal] * 2, [rollout] * 2]
    baselines = oracles.ema_baseline(*worlds)
    for out, baseline in zip((first, second), baselines, strict=True):
        expected = oracles.rloo(signal, rollout) + 0.5 * baseline
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="has state"):
        chain(signal, rollout)
    with pytest.raises(ValueError, match="use the state that"):
        chain.update(signal, (), rollout)


def test_missing_fields_are_named():
    signal, rollout = oracles.world()
    bare = dataclasses.replace(rollout, values=None, ref_logprobs=None)
    for transform, field in ((signals.gae(), "values"), (signals.kl_penalty(0.1), "ref_logprobs")):
        with pytest.raises(ValueError, match=f"rollout.{field}"):
            transform(signal, bare)
    with pytest.raises(ValueError, match="same rollout"):
        signals.whiten()(signal[:, :3], rollout)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: signals.group_norm(ddof=2), "ddof=2"),
        (lambda: signals.group_norm(eps=-1e-6), "eps=-1e-06"),
        (lambda: signals.batch_norm(eps=float("nan")), "eps=nan"),
        (lambda: signals.whiten(ddof=-1), "ddof=-1"),
        (lambda: signals.returns(1.1), "gamma=1.1"),
        (lambda: signals.gae(lam=-0.1), "lam=-0.1"),
        (lambda: signals.gae(gamma=2), "gamma=2"),
        (lambda: signals.kl_penalty(-0.1), "coef=-0.1"),
        (lambda: signals.kl_penalty(0.1, estimator="k4"), "estimator='k4'"),
        (lambda: signals.overlong(0, 1), "max_tokens=0"),
        (lambda: signals.overlong(8, 0), "buffer=0"),
        (lambda: signals.overlong(8, 9), "buffer=9"),
        (lambda: signals.overlong(8, 4, penalty=-1.0), "penalty=-1.0"),
        (lambda: signals.clip(0), "limit=0"),
        (lambda: signals.scale(float("inf")), "factor=inf"),
        (lambda: signals.shift(float("nan")), "offset=nan"),
        (lambda: signals.ema_baseline(1.0), "decay=1.0"),
    ],
)
def test_impossible_hyperparameters_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} .*; pass "):
        build()


def test_words_are_no_numbers():
    # Without the type checker of the tests a user's string gets as far as this.
    for value in ("5", None, [1.0]):
        with pytest.raises(ValueError, match="^limit=.* is not a number; pass .* above 0$"):
            check_number("limit", value, above=0)
    check_number("limit", jnp.array(-1.0), above=0)


def best_of(signal, rollout, *, bonus, mode="plain"):
    return (bonus if mode == "plain" else -bonus) * jnp.where(rollout.mask, signal, 0)


def test_a_users_function_is_lifted_by_one_call():
    signal, rollout = oracles.world()
    mine = stateless(best_of, bonus=2.0, mode="plain")
    assert isinstance(mine, Stateless) and repr(mine) == "best_of(bonus=2.0)"
    assert mine == stateless(best_of, bonus=2.0, mode="plain")
    assert mine != stateless(best_of, bonus=2.0, mode="other")
    np.testing.assert_allclose(
        (mine | signals.rloo())(signal, rollout), 2 * signals.rloo()(signal, rollout), rtol=1e-5
    )
    over = jax.vmap(lambda b: stateless(best_of, bonus=b)(signal, rollout))(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(over[1], 3 * over[0], rtol=1e-6)
    # Leaves only numbers: two users of one function share one compilation.
    traces = []

    @jax.jit
    def compiled(transform, signal, rollout):
        traces.append(transform)
        return transform(signal, rollout)

    compiled(stateless(best_of, bonus=2.0), signal, rollout)
    compiled(stateless(best_of, bonus=5.0), signal, rollout)
    assert len(traces) == 1
