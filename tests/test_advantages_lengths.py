"""The pieces that compare tokens of one ordinal, and lengths, within a group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles_time
import pytest
from oracles_time import at, rows, run

from eqrl import _advantages as signals
from eqrl._transform import check_groups


def test_optimal_token_baseline_by_hand(x64):
    # Energies (1 - p)^2 + (sum of squares - p^2): 0.5 a token in row 0, 0.0625 + 0.0625 in row 1.
    p = np.array([[0.5] * 3, [0.75] * 3])
    squares = np.where(p == 0.5, 0.5, 0.625)
    signal, rollout = rows(
        [[0, 0, 1], [0, 0, 0]], np.ones((2, 3)), logprobs=np.log(p), sum_pi_squared=squares
    )
    found = run(signals.optimal_token_baseline(), signal, rollout)
    np.testing.assert_allclose(found[0], 3 * [1 - 0.8], atol=1e-12)  # 0.5 : 0.125 at every t
    np.testing.assert_allclose(found[1], 3 * [-0.8], atol=1e-12)


def test_optimal_token_baseline_minimises_the_variance(x64):
    # Over all outcomes of two draws from one softmax: the exact second moment of (G - b) times
    # the gradient with respect to the logits is least at b = E[G W] / E[W].
    logits = np.array([0.3, -0.4, 1.1])
    p = np.exp(logits) / np.exp(logits).sum()
    worth = np.array([1.0, -2.0, 0.5])
    score = np.eye(3) - p  # gradient of log p[v] with respect to the logits, one row each
    energy = 1 - 2 * p + np.sum(p**2)
    np.testing.assert_allclose(energy, np.sum(score**2, axis=1), atol=1e-12)
    best = np.sum(p * worth * energy) / np.sum(p * energy)

    def moment(b):
        return np.sum(p * (worth - b) ** 2 * np.sum(score**2, axis=1))

    assert moment(best) < moment(best + 1e-3) and moment(best) < moment(best - 1e-3)
    # A group in which each outcome occurs as often as it should has that baseline.
    counts = np.array([5, 3, 12])
    p = counts / counts.sum()
    drawn = np.repeat(np.arange(3), counts)
    energy = 1 - 2 * p + np.sum(p**2)
    best = np.sum(p * worth * energy) / np.sum(p * energy)
    signal, rollout = rows(
        worth[drawn][:, None],
        np.ones((20, 1)),
        logprobs=np.log(p[drawn])[:, None],
        sum_pi_squared=np.sum(p**2),
    )
    found = run(signals.optimal_token_baseline(), signal, rollout)
    np.testing.assert_allclose(found[:, 0], worth[drawn] - best, atol=1e-12)


def test_optimal_token_baseline_counts_tokens_not_columns(x64):
    # The same two completions, one of them shifted and with a gap.
    shared = {"logprobs": np.log(0.4), "sum_pi_squared": 0.3}
    dense = run(
        signals.optimal_token_baseline(),
        *rows([[1.0, 2, 3, 0, 0, 0], [4, 5, 6, 0, 0, 0]], [[1, 1, 1, 0, 0, 0]] * 2, **shared),
    )
    loose = run(
        signals.optimal_token_baseline(),
        *rows(
            [[1.0, 2, 3, 0, 0, 0], [0, 4, 0, 0, 5, 6]],
            [[1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1]],
            **shared,
        ),
    )
    np.testing.assert_allclose(loose[0], dense[0], atol=1e-12)
    np.testing.assert_allclose(loose[1, jnp.array([1, 4, 5])], dense[1, :3], atol=1e-12)


def test_optimal_token_baseline_beyond_the_second_longest():
    mask = [[1, 1, 1, 1], [1, 1, 0, 0]]
    signal, rollout = rows(
        [[0, 0, 0, 1], [0, 0.5, 0, 0]], mask, logprobs=np.log(0.4), sum_pi_squared=0.3
    )
    found = np.asarray(run(signals.optimal_token_baseline(), signal, rollout))
    np.testing.assert_array_equal(found[0, 2:], 0)
    assert np.all(found[:, :2] != 0)


@pytest.mark.parametrize("certain", [False, True])
def test_optimal_token_baseline_of_equal_returns_is_exactly_zero(certain):
    rng = np.random.default_rng(0)
    lengths = np.arange(1, 16)[:, None]
    mask = (np.arange(18) >= 2) & (np.arange(18) < 2 + lengths)
    last = np.arange(18) == 1 + lengths
    # Probabilities of 1 leave nothing to weigh with: the plain mean stands in.
    logprobs = np.zeros(mask.shape) if certain else -rng.random(mask.shape)
    for score in (7.41, 0.1, -3.3, 1e-3, 2e6):
        signal, rollout = rows(
            score * last, mask, dtype=jnp.float32, logprobs=logprobs, sum_pi_squared=1.0
        )
        for function in (run, jax.jit(run)):
            found = function(signals.optimal_token_baseline(), signal, rollout)
            np.testing.assert_array_equal(found, np.zeros(mask.shape, np.float32))


def test_optimal_token_baseline_of_certain_paths_is_the_mean():
    signal, rollout = rows([[1.0], [0.0], [0.5]], np.ones((3, 1)), logprobs=0.0, sum_pi_squared=1.0)
    found = run(signals.optimal_token_baseline(), signal, rollout)
    np.testing.assert_allclose(found[:, 0], [0.5, -0.5, 0.0], atol=1e-7)


def test_optimal_token_baseline_of_nearly_certain_tokens():
    # 1 - 2p + sum of squares would cancel to 0 or below in float32; the weights are 1 : 4 here.
    p, q = 1 - 1e-5, 1 - 2e-5
    logprobs = np.log([[p], [q]])
    squares = np.array([[p**2 + 1e-10], [q**2 + 4e-10]])
    signal, rollout = rows(
        [[1.0], [0.0]], np.ones((2, 1)), dtype=jnp.float32,
        logprobs=logprobs, sum_pi_squared=squares,
    )  # fmt: skip
    found = run(signals.optimal_token_baseline(), signal, rollout)
    np.testing.assert_allclose(found[:, 0], [0.8, -0.2], rtol=2e-2)


def test_optimal_token_baseline_is_linear_in_the_reward(x64):
    # So its derivative along a direction is its value there; the reference point drops out.
    signal, rollout = oracles_time.world()
    direction = oracles_time.world(1)[0]
    apply = lambda x: run(signals.optimal_token_baseline(), x, rollout)  # noqa: E731
    _, slope = jax.jvp(apply, (signal,), (direction,))
    np.testing.assert_allclose(slope, apply(direction), rtol=1e-12, atol=1e-12)


def test_optimal_token_baseline_survives_wild_ratios():
    signal, rollout = oracles_time.world(dtype=jnp.float32)
    wild = dataclasses.replace(rollout, logprobs=rollout.need("old_logprobs") - 200.0)
    found = run(signals.optimal_token_baseline(), signal, wild)
    assert np.all(np.isfinite(found)) and np.any(np.asarray(found) != 0)
    # All weights at the cap: the same as none.
    flat = run(signals.optimal_token_baseline(cap=None), signal, wild)
    np.testing.assert_allclose(found, flat, rtol=1e-4, atol=1e-5)


def test_optimal_token_baseline_of_one():
    signal, rollout = rows(
        [[1.0], [2.0], [5.0]], np.ones((3, 1)), [0, 0, 2], logprobs=-1.0, sum_pi_squared=0.3
    )
    transform = signals.optimal_token_baseline()
    with pytest.raises(ValueError, match=r"`optimal_token_baseline\(\)` .* group 2 .* at least 2"):
        transform(signal, rollout)
    found = jax.jit(transform)(signal, rollout)
    assert at(found, 2, 0) == 0 and at(found, 0, 0) != 0


def test_optimal_token_baseline_memory_is_batch_by_time():
    n = 4096
    signal, rollout = rows(
        np.random.default_rng(0).standard_normal((n, 1)), np.ones((n, 1)),
        np.arange(n) // 8 * 8, dtype=jnp.float32, logprobs=-1.0, sum_pi_squared=0.3,
    )  # fmt: skip
    for transform in (
        signals.optimal_token_baseline(), signals.length_cost(0.1), signals.length_reward(0.1),
    ):  # fmt: skip
        text = str(jax.make_jaxpr(jax.jit(transform))(signal, rollout))
        assert f"[{n},{n}]" not in text


# --- lengths --------------------------------------------------------------------------------------


def lengths_of(lengths, total, group=None):
    """Rows of the given lengths with the total on the last token."""
    lengths = np.asarray(lengths)
    column = np.arange(max(lengths) + 1)
    mask = column < lengths[:, None]
    last = column == lengths[:, None] - 1
    return *rows(np.asarray(total, float)[:, None] * last, mask, group), last


def test_length_cost_by_hand(x64):
    signal, rollout, last = lengths_of([2, 4, 8, 0, 3, 5], [1, 0, 1, 9, 0, 0], [0, 0, 0, 0, 4, 4])
    found = run(signals.length_cost(0.3), signal, rollout)
    # Two of three live rows pass in the first group, none in the second.
    change = np.array([-0.05, -0.1, -0.2, 0, 0, 0])
    np.testing.assert_allclose(found - signal, change[:, None] * last, atol=1e-12)
    found = run(signals.length_cost(0.3, threshold=1.0), signal, rollout)
    np.testing.assert_allclose(found, signal, atol=1e-12)


def test_length_reward_by_hand(x64):
    signal, rollout, last = lengths_of([2, 4, 8, 0, 3, 3], [1, 0, 1, 9, 1, 0], [0, 0, 0, 0, 4, 4])
    found = run(signals.length_reward(0.6), signal, rollout)
    # lambda = 0.5, 1/6, -0.5; the wrong row gains nothing; equal lengths change nothing.
    change = np.array([0.3, 0, -0.3, 0, 0, 0])
    np.testing.assert_allclose(found - signal, change[:, None] * last, atol=1e-12)
    all_wrong = run(signals.length_reward(0.6, threshold=2.0), signal, rollout)
    change = np.array([0, 0, -0.3, 0, 0, 0])
    np.testing.assert_allclose(all_wrong - signal, change[:, None] * last, atol=1e-12)


@pytest.mark.parametrize("build", [signals.length_cost, signals.length_reward])
def test_lengths_of_one_row(build, x64):
    signal, rollout, last = lengths_of([3, 2, 5, 0], [1, 0, 1, 0], [0, 0, 2, 2])
    found = run(build(0.3), signal, rollout)
    alone = -0.3 if build is signals.length_cost else 0.0
    np.testing.assert_allclose(found[2], signal[2] + alone * last[2], atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 per prompt but gets 1"):
        check_groups(build(0.3), 1)


@pytest.mark.parametrize("build", [signals.length_cost, signals.length_reward])
def test_gaps_are_no_length_and_the_last_token_bears_it(build, x64):
    signal, rollout = rows(np.ones((2, 6)), [[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0]], logprobs=0.0)
    dense, dense_rollout = rows(
        np.ones((2, 6)), [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], logprobs=0.0
    )
    found, other = run(build(0.3), signal, rollout), run(build(0.3), dense, dense_rollout)
    assert at(found, 0, 0) == 1 and at(found, 0, 3) == at(other, 0, 1) != 1
