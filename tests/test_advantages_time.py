"""Estimators over time and turns, and their family: loops, golden values, edges, refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles
import oracles_time
import pytest
from helpers import label
from oracles_time import at, rows, run

from eqrl import _advantages as signals
from eqrl._parse import parse


ORACLES = [
    (signals.returns(1.0, gap="decay"), oracles_time.returns_decay, {}),
    (signals.returns(0.7, gap="decay"), oracles_time.returns_decay, {"gamma": 0.7}),
    (signals.gae(gap="decay"), oracles_time.gae_decay, {}),
    (signals.gae(0.9, 0.6, gap="decay"), oracles_time.gae_decay, {"gamma": 0.9, "lam": 0.6}),
    (signals.gae_adaptive(), oracles_time.gae_adaptive, {}),
    (signals.gae_adaptive(0.9, alpha=0.4), oracles_time.gae_adaptive, {"gamma": 0.9, "alpha": 0.4}),
    (signals.turn_returns(), oracles_time.turn_returns, {}),
    (signals.turn_returns(0.7), oracles_time.turn_returns, {"gamma": 0.7}),
    (signals.turn_gae(), oracles_time.turn_gae, {}),
    (signals.turn_gae(0.9, 0.6), oracles_time.turn_gae, {"gamma": 0.9, "lam": 0.6}),
    *[
        (
            signals.kl_penalty(0.3, estimator=estimator, limit=0.4),
            oracles_time.kl_penalty,
            {"coef": 0.3, "estimator": estimator, "limit": 0.4},
        )
        for estimator in ("k1", "k2", "k3")
    ],
    (signals.kl_shaping(0.3), oracles_time.kl_shaping, {"coef": 0.3}),
    (signals.optimal_token_baseline(), oracles_time.optimal_token_baseline, {}),
    (signals.optimal_token_baseline(cap=1.1), oracles_time.optimal_token_baseline, {"cap": 1.1}),
    (signals.optimal_token_baseline(cap=None), oracles_time.optimal_token_baseline, {"cap": None}),
    (signals.length_cost(0.3), oracles_time.length_cost, {"coef": 0.3}),
    *[
        (
            signals.length_cost(0.3, threshold=threshold),
            oracles_time.length_cost,
            {"coef": 0.3, "threshold": threshold},
        )
        for threshold in (0.5, -0.5)
    ],
    (signals.length_reward(0.3), oracles_time.length_reward, {"coef": 0.3}),
    (
        signals.length_reward(0.3, threshold=-0.5),
        oracles_time.length_reward,
        {"coef": 0.3, "threshold": -0.5},
    ),
]


@pytest.mark.parametrize("transform, oracle, arguments", ORACLES, ids=label)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(transform, oracle, arguments, seed, x64):
    signal, rollout = oracles_time.world(seed)
    expected = oracle(signal, rollout, **arguments)
    np.testing.assert_allclose(run(transform, signal, rollout), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "transform, oracle",
    [
        (signals.optimal_token_baseline(), oracles_time.optimal_token_baseline),
        (signals.kl_shaping(0.3), lambda s, r: oracles_time.kl_shaping(s, r, 0.3)),
    ],
    ids=["optimal_token_baseline", "kl_shaping"],
)
def test_reads_the_samplers_logprobs_without_old_ones(transform, oracle, x64):
    signal, rollout = oracles_time.world(3)
    rollout = dataclasses.replace(rollout, logprobs=rollout.old_logprobs, old_logprobs=None)
    expected = oracle(signal, rollout)
    np.testing.assert_allclose(run(transform, signal, rollout), expected, rtol=1e-12, atol=1e-12)


# --- golden values of reference/algorithms.md, Appendix A (printed to six digits) -----------------

GAP = [1, 1, 0, 1, 1, 0]
REWARD = [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "gamma, lam, advantage",
    [
        (1.0, 1.0, [0.9, 0.8, 0, 0.6, 0.5, 0]),
        (1.0, 0.95, [0.763991, 0.698937, 0, 0.575, 0.5, 0]),
        (0.99, 0.95, [0.730415, 0.672424, 0, 0.56525, 0.5, 0]),
    ],
)
def test_golden_gae_decays_over_a_gap(gamma, lam, advantage, x64):
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    signal, rollout = rows([REWARD], [GAP], values=values)
    out = run(signals.gae(gamma, lam, gap="decay"), signal, rollout)[0]
    np.testing.assert_allclose(out, advantage, atol=6e-7)


@pytest.mark.parametrize(
    "gamma, expected",
    [
        (1.0, [0.9975, 0.9985, 0, 0.9965, 0.997, 0]),
        (0.9, [0.654567, 0.728408, 0, 0.8968, 0.997, 0]),
    ],
)
def test_golden_reinforce_pp_without_mask_skip(gamma, expected, x64):
    kl = [0.1, -0.2, 0, 0.05, 0.3, 0]
    signal, rollout = rows([REWARD], [GAP], logprobs=kl, ref_logprobs=0.0)
    chain = signals.kl_penalty(0.01, limit=10.0) | signals.returns(gamma, gap="decay")
    np.testing.assert_allclose(run(chain, signal, rollout)[0], expected, atol=6e-7)


# --- gaps and padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_gaps_do_not_matter_undiscounted_nor_where_there_are_none(gap, x64):
    signal, rollout = oracles_time.world()
    np.testing.assert_allclose(
        run(signals.gae(1.0, 1.0, gap=gap), signal, rollout),
        oracles.gae(signal, rollout, 1.0, 1.0),
        atol=1e-12,
    )
    solid = dataclasses.replace(rollout, mask=jnp.ones_like(rollout.mask).at[5].set(False))
    for mine, loop in (
        (signals.gae(0.9, 0.6, gap=gap), oracles.gae(signal, solid, 0.9, 0.6)),
        (signals.returns(0.9, gap=gap), oracles.returns(signal, solid, 0.9)),
    ):
        np.testing.assert_allclose(run(mine, signal, solid), loop, atol=1e-12)


PADDING = [
    signals.returns(0.9, gap="decay"),
    signals.gae(0.9, 0.6, gap="decay"),
    signals.gae_adaptive(0.9, alpha=0.4),
    signals.turn_returns(0.9),
    signals.turn_gae(0.9, 0.6),
    signals.optimal_token_baseline(),
    signals.kl_shaping(0.3),
    signals.length_reward(0.3),
]


@pytest.mark.parametrize("transform", PADDING, ids=repr)
def test_columns_of_padding_before_and_behind_do_not_matter(transform, x64):
    signal, rollout = oracles_time.world()
    out = run(transform, signal, rollout)

    def wide(x, fill):
        return jnp.pad(x, ((0, 0), (3, 2)), constant_values=fill)

    columns = {
        name: wide(getattr(rollout, name), jnp.nan)
        for name in (
            "logprobs", "old_logprobs", "ref_logprobs", "values", "sum_pi_squared", "old_entropy",
        )
    }  # fmt: skip
    padded = dataclasses.replace(
        rollout,
        tokens=wide(rollout.tokens, 0),
        mask=wide(rollout.mask, False),
        positions=wide(rollout.positions, -1),
        **columns,
    )
    found = run(transform, wide(signal, jnp.nan), padded)
    np.testing.assert_allclose(found, wide(out, 0.0), rtol=1e-12, atol=1e-12)


def test_padding_inside_a_gap_does_not_decay(x64):
    signal, rollout = rows([[1.0, 0, 0, 1.0]], [[1, 0, 0, 1]], values=0.5)
    some = dataclasses.replace(rollout, positions=jnp.asarray([[0, 1, -1, 2]], jnp.int32))
    for transform in (signals.returns(0.5, gap="decay"), signals.gae(0.5, 0.5, gap="decay")):
        short = run(transform, *rows([[1.0, 0, 1.0]], [[1, 0, 1]], values=0.5))
        found = run(transform, signal, some)
        np.testing.assert_allclose(found[:, [0, 1, 3]], short, atol=1e-12)
        assert at(found, 0, 0) != at(run(transform, signal, rollout), 0, 0)


# --- length-adaptive lambda -----------------------------------------------------------------------


def test_gae_adaptive_between_its_limits(x64):
    # Up to 1/alpha tokens lambda is 0; at 2/alpha it is one half.
    signal, rollout = oracles_time.world()
    one_step = oracles.gae(signal, rollout, 0.9, 0.0)
    np.testing.assert_allclose(
        run(signals.gae_adaptive(0.9), signal, rollout), one_step, atol=1e-12
    )
    signal, rollout = rows(np.ones((2, 8)), np.ones((2, 8)), values=0.3)
    half = oracles.gae(signal, rollout, 1.0, 0.5)
    found = run(signals.gae_adaptive(alpha=0.25), signal, rollout)
    np.testing.assert_allclose(found, half, atol=1e-12)


# --- turns ----------------------------------------------------------------------------------------


def test_turns_by_hand(x64):
    # Turns of 2, 1 and 2 tokens; rewards 1, 0, 4 a turn; values 1, 2, 3 at first tokens.
    mask = [[0, 1, 1, 0, 1, 0, 0, 1, 1]]
    reward = [[9, 0, 1, 9, 0, 9, 9, 3, 1]]
    signal, rollout = rows(reward, mask, values=[9, 1, 8, 9, 2, 9, 9, 3, 8])
    togo = [[0, 2, 2, 0, 2, 0, 0, 4, 4]]
    np.testing.assert_allclose(run(signals.turn_returns(0.5), signal, rollout), togo, atol=1e-12)
    # delta = 1 + 1 - 1, 0 + 1.5 - 2, 4 - 3; gamma * lam = 0.25.
    advantage = [[0, 0.9375, 0.9375, 0, -0.25, 0, 0, 1, 1]]
    found = run(signals.turn_gae(0.5, 0.5), signal, rollout)
    np.testing.assert_allclose(found, advantage, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_a_single_turn_gets_its_total(gamma, x64):
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    reward = np.random.default_rng(0).standard_normal(mask.shape)
    signal, rollout = rows(reward, mask, values=np.arange(5.0))
    total = np.sum(mask * reward, axis=1, keepdims=True) * mask
    found = run(signals.turn_returns(gamma), signal, rollout)
    np.testing.assert_allclose(found, total, atol=1e-12)
    first = np.argmax(mask, axis=1)[:, None]
    found = run(signals.turn_gae(gamma, 0.3), signal, rollout)
    np.testing.assert_allclose(found, total - first * mask, atol=1e-12)


def test_turn_gae_limits(x64):
    signal, rollout = oracles_time.world()
    first = oracles_time.turn_returns(
        np.where(first_tokens(rollout), rollout.need("values"), 0), rollout, 0.0
    )
    for gamma in (1.0, 0.8):
        togo = oracles_time.turn_returns(signal, rollout, gamma)
        found = run(signals.turn_gae(gamma, 1.0), signal, rollout)
        np.testing.assert_allclose(found + first, togo, rtol=1e-12, atol=1e-12)
        step = oracles_time.turn_gae(signal, rollout, gamma, 0.0)
        found = run(signals.turn_gae(gamma, 0.0), signal, rollout)
        np.testing.assert_allclose(found, step, rtol=1e-12, atol=1e-12)


def first_tokens(rollout):
    """True at each turn's first token."""
    out = np.zeros(rollout.mask.shape, bool)
    for i, row in enumerate(np.asarray(rollout.mask)):
        for turn in oracles_time.turns(list(np.flatnonzero(row))):
            out[i, turn[0]] = True
    return out


def test_tokens_with_a_gap_between_each_are_turns(x64):
    signal, rollout = rows(np.ones((1, 7)), [[1, 0, 1, 0, 1, 0, 1]], values=0.3)
    for turn, token in (
        (signals.turn_returns(0.9), signals.returns(0.9)),
        (signals.turn_gae(0.9, 0.6), signals.gae(0.9, 0.6)),
    ):
        np.testing.assert_allclose(run(turn, signal, rollout), run(token, signal, rollout))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_limits_of_gae(gamma, x64):
    signal, rollout = oracles_time.world(4)
    value = np.where(rollout.mask, rollout.need("values"), 0)
    for gap, togo in (
        ("carry", oracles.returns(signal, rollout, gamma)),
        ("decay", oracles_time.returns_decay(signal, rollout, gamma)),
    ):
        found = run(signals.gae(gamma, 1.0, gap=gap), signal, rollout)
        np.testing.assert_allclose(found + value, togo, rtol=1e-12, atol=1e-12)
    step = oracles_time.gae_decay(signal, rollout, gamma, 0.0)
    found = run(signals.gae(gamma, 0.0, gap="decay"), signal, rollout)
    np.testing.assert_allclose(found, step, rtol=1e-12, atol=1e-12)


def test_turns_over_a_long_row(x64):
    rng = np.random.default_rng(0)
    signal, rollout = rows(
        rng.standard_normal((1, 1025)), rng.random((1, 1025)) < 0.7, values=rng.random(1025)
    )
    for transform, loop in (
        (signals.turn_returns(0.97), oracles_time.turn_returns(signal, rollout, 0.97)),
        (signals.turn_gae(0.97, 0.9), oracles_time.turn_gae(signal, rollout, 0.97, 0.9)),
        (signals.gae(0.97, 0.9, gap="decay"), oracles_time.gae_decay(signal, rollout, 0.97, 0.9)),
    ):
        np.testing.assert_allclose(run(transform, signal, rollout), loop, rtol=1e-11, atol=1e-11)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: signals.gae(gap="skip"), "gap='skip'"),
        (lambda: signals.returns(gap="zero"), "gap='zero'"),
        (lambda: signals.gae_adaptive(1.1), "gamma=1.1"),
        (lambda: signals.gae_adaptive(alpha=0), "alpha=0"),
        (lambda: signals.turn_returns(-0.1), "gamma=-0.1"),
        (lambda: signals.turn_gae(1.5), "gamma=1.5"),
        (lambda: signals.turn_gae(lam=1.5), "lam=1.5"),
        (lambda: signals.kl_penalty(0.1, limit=0), "limit=0"),
        (lambda: signals.kl_shaping(-1.0), "coef=-1.0"),
        (lambda: signals.adaptive_kl_penalty(-1.0), "coef=-1.0"),
        (lambda: signals.adaptive_kl_penalty(target=0), "target=0"),
        (lambda: signals.adaptive_kl_penalty(horizon=0), "horizon=0"),
        (lambda: signals.adaptive_kl_penalty(estimator="k4"), "estimator='k4'"),
        (lambda: signals.optimal_token_baseline(cap=0), "cap=0"),
        (lambda: signals.length_cost(-0.1), "coef=-0.1"),
        (lambda: signals.length_cost(0.1, threshold=float("nan")), "threshold=nan"),
        (lambda: signals.length_reward(-0.1), "coef=-0.1"),
        (lambda: signals.length_reward(0.1, threshold=float("inf")), "threshold=inf"),
    ],
)
def test_impossible_hyperparameters_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named} .*; pass "):
        build()


@pytest.mark.parametrize(
    "transform, field",
    [
        (signals.gae_adaptive(), "values"),
        (signals.turn_gae(), "values"),
        (signals.adaptive_kl_penalty(), "ref_logprobs"),
        (signals.kl_shaping(0.1), "ref_logprobs"),
        (signals.optimal_token_baseline(), "sum_pi_squared"),
    ],
    ids=repr,
)
def test_missing_fields_are_named(transform, field):
    signal, rollout = oracles_time.world()
    assert transform.requires == {field}
    with pytest.raises(ValueError, match=f"rollout.{field}"):
        run(transform, signal, dataclasses.replace(rollout, **{field: None}))


@pytest.mark.parametrize(
    "build",
    [
        lambda: signals.turn_returns() | signals.rloo(),
        lambda: signals.rloo() | signals.turn_gae(),
        lambda: signals.gae_adaptive() | signals.length_cost(0.1),
        lambda: signals.rloo() | signals.length_reward(0.1),
        lambda: signals.whiten() | signals.optimal_token_baseline(),
    ],
)
def test_a_total_of_something_spread_is_refused(build):
    with pytest.raises(ValueError, match="already spread the signal over tokens"):
        build()


def test_what_chains(x64):
    signal, rollout = oracles_time.world()
    chain = signals.length_cost(0.1) | signals.rloo() | signals.kl_shaping(0.2)
    expected = oracles_time.length_cost(signal, rollout, 0.1)
    expected = oracles_time.kl_shaping(oracles.rloo(expected, rollout), rollout, 0.2)
    np.testing.assert_allclose(chain(signal, rollout), expected, rtol=1e-12, atol=1e-12)
    assert chain.min_group == 2 and parse(repr(chain)) == chain
