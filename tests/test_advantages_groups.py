"""Baselines over groups, reward components, and the options of older members: values and laws."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_groups
import pytest
from test_advantages import GAP, VALUES, live_scores, one_row, one_token_rows, run

from eqrl import _advantages as signals
from eqrl._parse import parse
from eqrl._transform import check_groups
from eqrl._types import Rollout


ORACLES = [
    ("group_norm", {"deviation": "batch"}),
    ("group_norm", {"deviation": "batch", "ddof": 0, "eps": 0.3}),
    ("group_norm", {"deviation": "others"}),
    ("group_norm", {"deviation": "others", "ddof": 0, "eps": 0.3}),
    ("group_norm", {"deviation": "group", "ddof": 0}),
    ("opo", {}),
    ("gpg", {}),
    ("gpg", {"f_norm": 2.5}),
    ("max_rl", {}),
    ("remax", {}),
    ("pass_at_k", {"k": 2}),
    ("pass_at_k", {"k": 3}),
    ("pass_at_k", {"k": 9, "eps": 0.3}),
    ("component", {"index": 0}),
    ("component", {"index": 1}),
    ("whiten", {"stabiliser": "inside", "eps": 0.3}),
    ("whiten", {"stabiliser": "outside", "eps": 0.3}),
    ("whiten", {"stabiliser": "clamp", "ddof": 0}),
    ("whiten", {"stabiliser": "clamp", "eps": 9.0}),
    ("clip", {"limit": 0.5, "low": -0.2}),
    ("clip", {"limit": 0.5, "low": 0.1}),
    ("overlong", {"max_tokens": 3, "buffer": 2, "penalty": 0.5, "capped": False}),
    ("overlong", {"max_tokens": 3, "buffer": 2, "penalty": 0.5, "capped": True}),
]


@pytest.mark.parametrize("name, arguments", ORACLES)
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_loop(name, arguments, seed, x64):
    signal, rollout = oracles.world(seed)
    out = run(getattr(signals, name)(**arguments), signal, rollout)
    expected = getattr(oracles_groups, name)(signal, rollout, **arguments)
    assert np.any(expected != 0)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, (1.0, 0.5), (-2, 3)])
@pytest.mark.parametrize("options", [{}, {"ddof": 0, "eps": 0.3}])
def test_gdpo_equals_the_loop(weights, options, x64):
    signal, rollout = oracles.world(1)
    out = run(signals.gdpo(*(weights or ()), **options), signal, rollout)
    expected = oracles_groups.gdpo(signal, rollout, weights, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


def test_plain_ema_equals_the_loop(x64):
    worlds = [oracles.world(seed) for seed in range(4)]
    transform = signals.ema_baseline(0.8, debias=False)
    state, out = transform.init(), []
    for signal, rollout in worlds:
        advantage, state = transform.update(signal, state, rollout)
        out.append(advantage)
    expected = oracles_groups.plain_ema_baseline(*zip(*worlds, strict=True), decay=0.8)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)


# --- golden values of reference/algorithms.md, Appendix A (printed to six digits) -----------------


def rows_of(lengths, scores):
    """A group whose rows have these numbers of tokens; the score on the last."""
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    n, shape = len(lengths), mask.shape
    rollout = Rollout(
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.asarray(mask),
        positions=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape),
        group=jnp.zeros(n, jnp.int32),
        truncated=jnp.zeros(n, bool),
    )
    signal = np.zeros(shape)
    signal[np.arange(n), np.asarray(lengths) - 1] = scores
    return jnp.asarray(signal), rollout


@pytest.mark.parametrize(
    "transform, scores, expected",
    [
        (
            signals.group_norm(deviation="others"),
            [1, 0, 0, 1, 0],
            [1.499997, -0.866024, -0.866024, 1.499997, -0.866024],
        ),
        (signals.max_rl(), [1, 0, 0, 1, 0], [1.5, -1, -1, 1.5, -1]),
        (signals.pass_at_k(4), [3, 1, 2, 0], [1, 0, 0, 0]),
        (signals.pass_at_k(4, eps=1e-6), [3, 1, 2, 0], [0.774596, 0, 0, 0]),
        # alpha = 5 rows / 2 that score.
        (signals.gpg(), [1, 0, 0, 1, 0], [1.5, -1, -1, 1.5, -1]),
        (signals.gpg(), [1, -1, -1, 1, -1], [1.2, -0.8, -0.8, 1.2, -0.8]),
        (signals.gpg(), [0, 0, 0], [0, 0, 0]),
    ],
    ids=str,
)
def test_golden_groups(transform, scores, expected, x64):
    out = run(transform, *one_token_rows(scores))[:, 0]
    np.testing.assert_allclose(out, expected, atol=5e-7)


def test_golden_opo(x64):
    signal, rollout = rows_of([10, 20, 30, 40, 50], [1, 0, 0, 1, 0])
    out = run(signals.opo(), signal, rollout)
    np.testing.assert_allclose(out[:, 0], [2 / 3, -1 / 3, -1 / 3, 2 / 3, -1 / 3], rtol=1e-12)


def test_golden_whiten_of_gae(x64):
    signal, rollout = one_row([0, 0, 0, 0, 1, 0], GAP, values=VALUES)
    advantage = signals.gae(1.0, 0.95)
    for whiten, expected in (
        (signals.whiten(), [1.049517, 0.614935, 0, -0.572257, -1.092195, 0]),
        (
            signals.whiten(ddof=0, stabiliser="clamp"),
            [1.211878, 0.710066, 0, -0.660786, -1.261158, 0],
        ),
        (
            signals.whiten(eps=1e-5, stabiliser="outside"),
            [1.049444, 0.614893, 0, -0.572217, -1.09212, 0],
        ),
    ):
        out = run(advantage | whiten, signal, rollout)[0]
        np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("length, expected", [(90, 0), (110, -0.5), (120, -1), (130, -1.5)])
def test_golden_overlong_without_cap(length, expected, x64):
    mask = np.arange(140) < length
    transform = signals.overlong(120, 20, capped=False)
    out = run(transform, *one_row(np.zeros(140), mask))[0]
    np.testing.assert_allclose(out[length - 1], expected, atol=1e-12)


def test_remax_by_hand(x64):
    signal, rollout = one_row([0.5, 9.0, 0.25, 1.0], [1, 0, 1, 1])
    rollout = dataclasses.replace(rollout, greedy_rewards=jnp.asarray([0.75]))
    out = run(signals.remax(), signal, rollout)[0]
    np.testing.assert_allclose(out, [1.0, 0, 0.5, 0.25], rtol=1e-12)
    with pytest.raises(ValueError, match=r"rollout\.greedy_rewards"):
        signals.remax()(signal, dataclasses.replace(rollout, greedy_rewards=None))
    assert signals.remax().requires == {"greedy_rewards"}


# --- deviations -----------------------------------------------------------------------------------


def test_equal_others_leave_the_score_unnormalised():
    # One of five is different: no deviation among the others, to be seen exactly in float32.
    transform = jax.jit(signals.group_norm(deviation="others"))
    for same, odd in ((0.0, 1.0), (7.41, 0.3), (0.1, 0.11), (-3.3, 2e6)):
        scores = np.asarray([same, same, odd, same, same], np.float32)
        out = transform(*one_token_rows(scores, dtype=jnp.float32))[:, 0]
        assert float(out[2]) == scores[2] - scores[0]
        quarter = (scores[0] - scores[2]) / np.float32(4)
        np.testing.assert_allclose(out[0], quarter / (abs(quarter) * 2 + 1e-6), rtol=1e-5)


def test_groups_of_two_have_no_deviation_of_others():
    signal, rollout = one_token_rows([1.0, 4.0, 2.0, 2.0], [0, 0, 2, 2])
    for ddof in (0, 1):
        out = run(signals.group_norm(deviation="others", ddof=ddof), signal, rollout)[:, 0]
        np.testing.assert_array_equal(out, [-3, 3, 0, 0])
    # Three rows leave two others: a deviation with one degree of freedom.
    out = run(signals.group_norm(deviation="others", eps=0), *one_token_rows([0.0, 2.0, 3.0]))
    np.testing.assert_allclose(out[0, 0], -2.5 / np.sqrt(0.5), rtol=1e-6)


def test_close_others_keep_their_digits():
    # Squares of the whole group minus the own one would keep none of them in float32.
    scores = np.asarray([1e3, 0.0, 1e-3, 3e-3, 2e-3], np.float32)
    transform = signals.group_norm(deviation="others", eps=0)
    out = run(transform, *one_token_rows(scores, dtype=jnp.float32))
    others = scores[1:].astype(float)
    expected = (1e3 - others.mean()) / others.std(ddof=1)
    np.testing.assert_allclose(out[0, 0], expected, rtol=1e-5)


def test_batch_deviation_is_of_the_raw_totals(x64):
    # Groups 0, 2 and 10, 12: each spreads by sqrt(2), the batch by sqrt(104 / 3).
    signal, rollout = one_token_rows([0, 2, 10, 12], [0, 0, 1, 1])
    out = run(signals.group_norm(deviation="batch", eps=0), signal, rollout)[:, 0]
    np.testing.assert_allclose(out, np.array([-1, 1, -1, 1]) / np.sqrt(104 / 3), rtol=1e-12)


def test_clamped_variance_is_exact_above_eps(x64):
    signal, rollout = oracles.world()
    exact = run(signals.whiten(eps=0), signal, rollout)
    clamped = run(signals.whiten(eps=1e-2, stabiliser="clamp"), signal, rollout)
    np.testing.assert_array_equal(clamped, exact)


@pytest.mark.parametrize("stabiliser", ["inside", "outside", "clamp"])
def test_a_constant_signal_is_whitened_to_zero(stabiliser):
    signal, rollout = one_token_rows(np.full(15, 7.41), dtype=jnp.float32)
    for eps in (0, 1e-8):
        out = run(signals.whiten(eps=eps, stabiliser=stabiliser), signal, rollout)
        np.testing.assert_array_equal(out, 0)


# --- pass@k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 6, 7, 11])
def test_pass_at_k_equals_all_subsets(k, x64):
    rng = np.random.default_rng(k)
    sizes = [7, 2, 5, 6, 3]
    group = rng.permutation(np.repeat(np.arange(5), sizes))
    scores = rng.integers(-2, 3, len(group)) * 0.7  # many ties
    out = run(signals.pass_at_k(k), *one_token_rows(scores, group))[:, 0]
    for g in range(5):
        rows = np.flatnonzero(group == g)
        expected = oracles_groups.best_of_subsets(list(scores[rows]), k)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-12, atol=1e-12)


def test_pass_at_k_has_the_gradient_of_the_best_of_k(x64):
    # Every sample of 4 from 3 answers, weighted by its chance: an expectation without noise.
    n, values, logits = 4, np.array([0.3, -1.0, 2.0]), jnp.array([0.2, 1.1, -0.5])
    draws = np.array(list(itertools.product(range(3), repeat=n)))
    group = np.repeat(np.arange(len(draws)), n)
    probabilities = np.asarray(jax.nn.softmax(logits))
    chance = probabilities[draws].prod(axis=1)
    score_function = np.eye(3)[draws] - probabilities  # d log pi / d logits
    for k in (2, 3, 4):
        out = run(signals.pass_at_k(k), *one_token_rows(values[draws].ravel(), group))
        each = np.asarray(out).reshape(draws.shape)
        estimate = np.einsum("s,si,sil->l", chance, each / n, score_function)

        def best(logits, k=k):
            sets = np.array(list(itertools.product(range(3), repeat=k)))
            chances = jnp.prod(jax.nn.softmax(logits)[sets], axis=1)
            return jnp.sum(chances * values[sets].max(axis=1))

        np.testing.assert_allclose(k * estimate, jax.grad(best)(logits), rtol=1e-10)


def test_pass_at_k_of_all_is_the_lead_of_the_best(x64):
    scores, group = live_scores()
    out = run(signals.pass_at_k(10), *one_token_rows(scores, group))[:, 0]
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        *_, second, best = np.sort(scores[rows])
        expected = np.where(scores[rows] == best, best - second, 0)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-12)
    # Two best ones: neither is missed.
    out = run(signals.pass_at_k(4), *one_token_rows([3.0, 1.0, 3.0, 0.0]))
    np.testing.assert_array_equal(out, 0)


def test_pass_at_k_in_a_large_group_of_float32():
    rng = np.random.default_rng(0)
    n, k = 300, 16
    right = rng.random(n) < 0.3
    out = run(signals.pass_at_k(k), *one_token_rows(right * 1.0, dtype=jnp.float32))[:, 0]
    # A right one matters where the k - 1 others are all wrong.
    wrong, choices = n - right.sum(), np.arange(k - 1)
    expected = np.prod((wrong - choices) / (n - 1 - choices))
    np.testing.assert_allclose(out, right * expected, rtol=1e-5)


def test_pass_at_k_vmaps_over_integers(x64):
    signal, rollout = oracles.world()
    together = jax.vmap(lambda k: run(signals.pass_at_k(k), signal, rollout))(jnp.array([2, 3]))
    apart = [run(signals.pass_at_k(k), signal, rollout) for k in (2, 3)]
    np.testing.assert_allclose(together, apart, rtol=1e-12)


# --- reward components ----------------------------------------------------------------------------


def test_components_compose(x64):
    signal, rollout = oracles.world()
    advantage = (signals.component(0) | signals.group_norm()) + 0.5 * (
        signals.component(1) | signals.group_norm()
    )
    assert advantage.starts and parse(repr(advantage)) == advantage
    first, second = (jnp.asarray(oracles_groups.component(signal, rollout, i)) for i in (0, 1))
    expected = oracles_groups.group_norm(first, rollout)
    expected = expected + 0.5 * oracles_groups.group_norm(second, rollout)
    np.testing.assert_allclose(advantage(signal, rollout), expected, rtol=1e-12, atol=1e-12)
    other = advantage(jnp.full_like(signal, jnp.nan), rollout)
    np.testing.assert_array_equal(other, advantage(signal, rollout))


def test_components_outside_are_refused():
    signal, rollout = oracles.world()
    with pytest.raises(ValueError, match=r"^index=2 is .* has 2 components; pass .* below 2"):
        signals.component(2)(signal, rollout)
    with pytest.raises(ValueError, match=r"rollout\.rewards"):
        signals.component(0)(signal, dataclasses.replace(rollout, rewards=None))
    loud = jax.jit(lambda index: signals.component(index)(signal, rollout))(2)
    assert np.all(np.isnan(np.asarray(loud).sum(axis=1)) == np.asarray(rollout.mask).any(axis=1))


def test_component_vmaps_over_its_index():
    signal, rollout = oracles.world()
    both = jax.vmap(lambda index: signals.component(index)(signal, rollout))(jnp.arange(2))
    for index in (0, 1):
        np.testing.assert_array_equal(both[index], signals.component(index)(signal, rollout))


@pytest.mark.parametrize("start", [signals.component(0), signals.gdpo()], ids=repr)
def test_nothing_stands_before_a_start(start):
    with pytest.raises(ValueError, match=r"`clip\(1.0\)` before it would have no effect"):
        _ = signals.clip(1.0) | start
    assert start.starts and not start.reads_total and not start.spreads


def test_gdpo_is_the_sum_of_normalised_components(x64):
    signal, rollout = oracles.world()
    sums = (signals.component(0) | signals.group_norm()) + 0.5 * (
        signals.component(1) | signals.group_norm()
    )
    spread = signals.gdpo(1.0, 0.5) | signals.returns()
    out = spread(signal, rollout)
    np.testing.assert_allclose(out, sums(signal, rollout), rtol=1e-12, atol=1e-12)


def test_gdpo_ends_as_in_trl_and_in_verl(x64):
    signal, rollout = oracles.world()
    score = jnp.asarray(oracles_groups.gdpo(signal, rollout, (1.0, 0.5), eps=1e-4))
    trl = signals.gdpo(1.0, 0.5, eps=1e-4) | signals.batch_norm(eps=1e-4)
    expected = oracles.batch_norm(score, rollout, eps=1e-4)
    np.testing.assert_allclose(trl(signal, rollout), expected, rtol=1e-12, atol=1e-12)
    verl = signals.gdpo(1.0, 0.5) | signals.returns() | signals.whiten()
    score = oracles_groups.gdpo(signal, rollout, (1.0, 0.5))
    everywhere = np.where(rollout.mask, score.sum(axis=1, keepdims=True), 0.0)
    expected = oracles.whiten(everywhere, rollout)
    np.testing.assert_allclose(verl(signal, rollout), expected, rtol=1e-12, atol=1e-12)


def test_gdpo_counts_its_weights():
    signal, rollout = oracles.world()
    with pytest.raises(ValueError, match="3 weights but .* 2 components; pass one weight a"):
        signals.gdpo(1, 2, 3)(signal, rollout)
    np.testing.assert_array_equal(
        signals.gdpo()(signal, rollout), signals.gdpo(1, 1)(signal, rollout)
    )
    assert repr(signals.gdpo(1.0, 0.5, eps=1e-4)) == "gdpo(1.0, 0.5, eps=0.0001)"


def test_gdpo_vmaps_over_weights(x64):
    signal, rollout = oracles.world()
    together = jax.vmap(lambda w: signals.gdpo(1.0, w)(signal, rollout))(jnp.array([0.5, 2.0]))
    for out, weight in zip(together, (0.5, 2.0), strict=True):
        np.testing.assert_allclose(out, signals.gdpo(1.0, weight)(signal, rollout), rtol=1e-12)


@pytest.mark.parametrize(
    "transform", [signals.component(1), signals.gdpo(), signals.remax()], ids=repr
)
def test_numbers_of_empty_rows_stay_there(transform):
    signal, rollout = oracles.world()
    empty = ~np.asarray(rollout.mask).any(axis=1)
    hidden = dataclasses.replace(
        rollout,
        rewards=jnp.where(jnp.asarray(empty)[:, None], jnp.nan, rollout.need("rewards")),
        greedy_rewards=jnp.where(jnp.asarray(empty), jnp.nan, rollout.need("greedy_rewards")),
    )
    assert empty.sum() == 2
    np.testing.assert_array_equal(transform(signal, hidden), transform(signal, rollout))


# --- what the formulas imply ----------------------------------------------------------------------

GROUPED = [
    signals.group_norm(deviation="batch"),
    signals.group_norm(deviation="others"),
    signals.opo(),
    signals.gpg(),
    signals.max_rl(),
    signals.pass_at_k(2),
    signals.pass_at_k(3, eps=1e-6),
    signals.gdpo(),
]
grouped = pytest.mark.parametrize("transform", GROUPED, ids=repr)


def scored(scores, group, dtype=float):
    """One-token rows that also hold each score as their only reward component."""
    signal, rollout = one_token_rows(scores, group, dtype)
    return signal, dataclasses.replace(rollout, rewards=signal)


@pytest.mark.parametrize("transform", [t for t in GROUPED if "gpg" not in repr(t)], ids=repr)
def test_what_a_shift_of_each_group_does(transform, x64):
    scores, group = live_scores()
    shift = 0.0 * group if "batch" in repr(transform) else 3.0 * group
    out = run(transform, *scored(scores, group))
    shifted = run(transform, *scored(scores + 5 + shift, group))
    if "max_rl" in repr(transform):
        assert not np.allclose(shifted, out)
    else:
        np.testing.assert_allclose(shifted, out, rtol=1e-10, atol=1e-10)


@grouped
def test_what_a_scale_does(transform, x64):
    scores, group = live_scores()
    linear = any(word in repr(transform) for word in ("opo", "gpg", "pass_at_k(2)"))
    out = run(transform, *scored(scores, group))
    scaled = run(transform, *scored(5 * scores, group))
    if "others" in repr(transform):  # groups of two are not normalised
        pair = np.asarray(group)[:, None] == 4
        out = jnp.where(pair, 5 * out, out)
    np.testing.assert_allclose(scaled, (5.0 if linear else 1.0) * out, rtol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [signals.group_norm(deviation="batch"), signals.gpg(), signals.max_rl(), signals.gdpo()],
    ids=repr,
)
def test_groups_sum_to_zero(transform, x64):
    scores, group = live_scores()
    out = run(transform, *scored(np.abs(scores), group))[:, 0]
    assert np.all(np.asarray(out) != 0)
    for g in np.unique(group):
        np.testing.assert_allclose(np.sum(out[group == g]), 0, atol=1e-13)


def test_tokens_of_opo_sum_to_zero(x64):
    signal, rollout = oracles.world()
    rows = jnp.sum(run(signals.opo(), signal, rollout), axis=1)
    sums = jax.ops.segment_sum(rows, rollout.group, num_segments=11)
    np.testing.assert_allclose(sums, 0, atol=1e-13)
    # With equal lengths the weights do not matter.
    scores, group = live_scores()
    out = run(signals.opo(), *one_token_rows(scores, group))
    center = run(signals.group_center(), *one_token_rows(scores, group))
    np.testing.assert_allclose(out, center, rtol=1e-12, atol=1e-14)


def test_pass_at_k_is_not_negative_and_follows_the_order(x64):
    scores, group = live_scores()
    for k in (2, 3, 5):
        out = np.asarray(run(signals.pass_at_k(k), *one_token_rows(scores, group)))[:, 0]
        assert np.all(out >= 0)
        for g in np.unique(group):
            rows = np.flatnonzero(group == g)
            ranked = out[rows][np.argsort(scores[rows])]
            assert ranked[0] == 0 and np.all(np.diff(ranked) >= 0) and ranked[-1] > 0


@grouped
def test_constant_groups_are_exactly_zero_beside_others(transform):
    # Trap 32, with groups of 2 to 16 live rows.
    compiled = jax.jit(transform)
    for size in range(2, 17):
        scores = np.r_[np.full(16, 7.41), 0.0, 1.0, 0.5, np.full(16, 0.3)]
        group = np.r_[np.zeros(16), 1, 1, 1, np.full(16, 2)]
        live = np.r_[np.arange(16) < size, True, True, True, np.arange(16) < size]
        signal, rollout = scored(scores, group, jnp.float32)
        rollout = dataclasses.replace(rollout, mask=jnp.asarray(live)[:, None])
        out = np.asarray(compiled(signal, rollout))[:, 0]
        np.testing.assert_array_equal(out[group != 1], 0)
        assert np.any(out[group == 1] != 0)


@grouped
def test_groups_of_one(transform):
    assert transform.min_group == transform.lifted.hyperparameters.get("k", 2)
    signal, rollout = scored([1.0, 2.0, 5.0], [0, 0, 2])
    name = repr(transform).split("(")[0]
    with pytest.raises(ValueError, match=rf"`{name}\(\)` compares .* group 2 .* at least 2"):
        transform(signal, rollout)
    out = jax.jit(transform)(signal, rollout)
    assert float(out[2, 0]) == 0 and np.all(np.isfinite(out)) and float(out[1, 0]) > 0
    # Its group has two rows, one of them empty: nothing to refuse, nothing to learn.
    signal, rollout = scored([1.0, 2.0, 5.0, 6.0], [0, 0, 2, 2])
    rollout = dataclasses.replace(rollout, mask=rollout.mask.at[3].set(False))
    out = transform(signal, rollout)
    np.testing.assert_array_equal(out[2:], 0)


@grouped
def test_names_and_order_of_groups_do_not_matter(transform, x64):
    rng = np.random.default_rng(3)
    scores, group = rng.integers(0, 3, 40) + 0.5, np.repeat(np.arange(8), 5)
    order, names = rng.permutation(40), rng.permutation(40)
    out = run(transform, *scored(scores, group))
    moved = run(transform, *scored(scores[order], names[group][order]))
    np.testing.assert_allclose(moved, out[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: signals.group_norm(deviation="rows"), "deviation='rows'"),
        (lambda: signals.whiten(stabiliser="none"), "stabiliser='none'"),
        (lambda: signals.clip(1.0, low=1.0), "low=1.0"),
        (lambda: signals.clip(-1.0, low=0.0), "low=0.0"),
        (lambda: signals.clip(float("nan"), low=0.0), "limit=nan"),
        (lambda: signals.gpg(0.0), "f_norm=0.0"),
        (lambda: signals.pass_at_k(1), "k=1"),
        (lambda: signals.pass_at_k(2.5), "k=2.5"),
        (lambda: signals.pass_at_k(True), "k=True"),
        (lambda: signals.pass_at_k(float("inf")), "k=inf"),
        (lambda: signals.pass_at_k(2, eps=-1.0), "eps=-1.0"),
        (lambda: signals.component(-1), "index=-1"),
        (lambda: signals.component(1.0), r"index=1\.0"),
        (lambda: signals.component(True), "index=True"),
        (lambda: signals.component(jnp.array(1.0)), r"index=Array\(1\."),
        (lambda: signals.gdpo(1.0, float("nan")), r"weights\[1\]=nan"),
        (lambda: signals.gdpo(ddof=2), "ddof=2"),
        (lambda: signals.gdpo(eps=-1.0), "eps=-1.0"),
        (lambda: signals.ema_baseline(1.0, debias=False), "decay=1.0"),
    ],
)
def test_impossible_hyperparameters_are_refused(build, named):
    with pytest.raises(ValueError, match=f"^{named}.*; pass "):
        build()


def test_a_score_is_gathered_only_from_what_was_spread():
    with pytest.raises(ValueError, match=r"`as_score\(\)` gathers.*`kl_penalty\(0.1\)` before it"):
        _ = signals.kl_penalty(0.1) | signals.as_score()
    assert not (signals.rloo() | signals.as_score()).spreads


def test_pass_at_k_needs_k_completions():
    for k in (2, 5):
        with pytest.raises(ValueError, match=f"at least {k} per prompt"):
            check_groups(signals.pass_at_k(k), k - 1)
        check_groups(signals.pass_at_k(k), k)


def test_a_lone_row_with_gaps_is_refused_and_a_lone_empty_row_is_not():
    signal, rollout = oracles.world()
    lone = dataclasses.replace(rollout, group=rollout.group.at[0].set(10))
    assert 0 < int(lone.mask[0].sum()) < 8
    with pytest.raises(ValueError, match="group 10"):
        signals.rloo()(signal, lone)
    empty = dataclasses.replace(rollout, group=rollout.group.at[5].set(10))
    assert not np.any(empty.mask[5])
    signals.rloo()(signal, empty)
