"""The invariants of losses; worlds, numbering and tables as in `test_invariants.py`."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members_factors import FACTORS
from members_terms import RATIOS, TERMS
from test_invariants import (
    ALL,
    ROWS,
    SEEDS,
    clean,
    everything,
    grade_all,
    poison,
    random_world,
    same,
    study,
    swap,
)

from eqrl import _advantages as signals, _losses as losses
from eqrl._kl import kl_estimate
from eqrl._logprobs import chunked, reference
from eqrl._losses.base import AddTerms, term
from eqrl._losses.factor import FactorTerm
from eqrl._types import Batch
from eqrl.algorithms import Algorithm


# As objectives of an algorithm: every member that chooses over a rollout, or sums over a row.
CHOOSE = (losses.gmpo, losses.clip_cov, losses.kl_cov)
OBJECTIVES = {
    repr(m): m.build() for m in TERMS if m.builder in CHOOSE or m.arguments.get("ratio")
} | {
    repr(m): m.build() * losses.clipped()
    for m in FACTORS
    if m.builder in (losses.top_entropy, losses.m2po, losses.normalised, losses.adaptive_entropy)
}


def as_algorithm(objective):
    return Algorithm(signals.group_norm(), objective, losses.sequence_mean())


# --- 1. any partition of the prepared batch -------------------------------------------------------


def partition(seed):
    """Rows in random order, in parts of 5, 5, 1 and 1."""
    return np.split(np.random.default_rng(seed + 40).permutation(ROWS), [5, 10, 11])


def part_of(tree, rows):
    """Some rows, and empty ones up to the whole's shape, as the last micro-batch is padded."""
    return jax.tree.map(lambda x: np.concatenate([x[rows], np.zeros_like(x[len(rows) :])]), tree)


def parts_of(seed, grade, *whole):
    return [grade(*part_of(whole, rows)) for rows in partition(seed)]


@functools.cache
def algorithms_in_parts(seed):
    return parts_of(seed, grade_all, random_world(seed)[2], clean(seed)[0])


def adds_up(seed, whole, parts):
    """Every part has its rows' share of the gradient, and the metrics sum to the whole's."""
    gradient, metrics = whole
    for rows, (part, _) in zip(partition(seed), parts, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (part, gradient)), strict=True):
            same(a, part_of(b, rows))
    assert all(part.keys() == metrics.keys() for _, part in parts)
    for key, value in metrics.items():
        same(sum(part[key] for _, part in parts), value)


@everything
def test_1_algorithms_add_up_over_any_partition(name):
    for seed in SEEDS:
        adds_up(seed, clean(seed)[1][name], [part[name] for part in algorithms_in_parts(seed)])


@jax.jit
def _prepare_objectives(signal, rollout):
    made = {name: as_algorithm(objective) for name, objective in OBJECTIVES.items()}
    return {name: a.assign(signal, a.init(), rollout)[0] for name, a in made.items()}


@jax.jit
def _grade_objectives(scores, batches):
    grade = lambda name: jax.grad(as_algorithm(OBJECTIVES[name]).loss, has_aux=True)  # noqa: E731
    return {name: grade(name)(scores, batch) for name, batch in batches.items()}


def in_x64(function, *arguments):
    """Arguments and results in NumPy, float64 in between."""
    with jax.enable_x64(True):
        return jax.device_get(function(*jax.tree.map(jnp.asarray, arguments)))


@functools.cache
def objectives(seed):
    signal, rollout, scores = random_world(seed)
    batches = in_x64(_prepare_objectives, signal, rollout)
    grade = functools.partial(in_x64, _grade_objectives)
    return batches, grade(scores, batches), parts_of(seed, grade, scores, batches)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_1_terms_and_factors_add_up_over_any_partition(name):
    for seed in SEEDS:
        _, whole, parts = objectives(seed)
        adds_up(seed, whole[name], [part[name] for part in parts])


CHOSEN = [
    *("algorithms.clip_cov", "algorithms.kl_cov", "algorithms.m2po"),
    *("clip_cov(share=0.08, low=0.1)", "kl_cov(share=0.2)", "m2po(budget=0.002)", "top_entropy()"),
]


@pytest.mark.parametrize("name", CHOSEN)
def test_1_what_is_chosen_over_the_rollout_is_really_chosen(name):
    # Otherwise the two tests above would say nothing of the pieces that look at all tokens.
    varied = []
    for seed in SEEDS:
        prepared = (clean(seed)[0] | objectives(seed)[0])[name].prepared
        mask = random_world(seed)[1].mask
        choices = [x for x in jax.tree.leaves(prepared) if x.shape == mask.shape]
        varied.append(any(np.ptp(x[mask].astype(float)) > 0 for x in choices))
    assert any(varied)


# --- 2 and 3. the same members do not see masked places, nor order --------------------------------


@functools.cache
def objectives_elsewhere(seed):
    """On a world of other order and other names, with NaN and infinities at masked places."""
    order = np.random.default_rng(seed + 50).permutation(ROWS)
    signal, rollout, scores = jax.tree.map(lambda x: x[order], random_world(seed))
    names = np.random.default_rng(seed).permutation(ROWS).astype(np.int32)
    rollout, mask = swap(rollout, group=names[rollout.group]), rollout.mask
    signal, rollout, scores = (poison(x, mask) for x in (signal, rollout, scores))
    batches = in_x64(_prepare_objectives, signal, rollout)
    return order, batches, in_x64(_grade_objectives, scores, batches)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_2_and_3_terms_and_factors_choose_tokens_and_not_places(name):
    for seed in SEEDS:
        batches, graded, _ = objectives(seed)
        order, moved_batches, moved = objectives_elsewhere(seed)
        pairs = (
            (moved_batches[name].prepared, batches[name].prepared),
            (moved[name][0], graded[name][0]),
        )
        for pair in pairs:
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                same(a, b[order])
        jax.tree.map(same, moved[name][1], graded[name][1])


# --- 8. at ratio 1 every surrogate is the policy gradient -----------------------------------------

# Not surrogates of the policy gradient: they add to one.
NO_SURROGATE = {"positive_nll", "kl", "entropy_bonus", "value_loss", "squared_ratio"}


def policy_gradient(objective, weighted, mask):
    """What a loss's gradient wrt log-probs is at ratio 1, from `-weights * advantages`."""
    if "cispo" in objective:  # the ratio decides a weight; the gradient is the token's own
        return weighted
    total = np.where(mask, weighted.sum(axis=1, keepdims=True), 0.0)
    if "geometric_ratio()" in objective or "gmpo(" in objective:
        return total / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return total if "sequence_ratio()" in objective else weighted


@jax.jit
def _slopes(scores, batch):
    slope = jax.grad(lambda scores, piece: _loss(piece, scores, batch))
    return {repr(m): slope(scores, m.build()).logprobs for m in TERMS}


def _loss(piece, scores, batch):
    batch = swap(batch, prepared=piece.prepare(batch, piece.init())[0])
    return jnp.sum(batch.weights * piece(scores, batch)[0])


@functools.cache
def slopes_at_one(seed, stored):
    _, rollout, scores = random_world(seed)
    rng = np.random.default_rng(seed)
    advantages, weights = (
        np.where(rollout.mask, x, 0.0)
        for x in (rng.standard_normal(rollout.mask.shape), rng.random(rollout.mask.shape))
    )
    if stored:
        rollout = swap(rollout, old_logprobs=scores.logprobs)
    else:
        rollout = swap(rollout, old_logprobs=None)
    with jax.enable_x64(True):
        parts = jax.tree.map(jnp.asarray, (rollout, advantages, weights, weights, advantages))
        scores = jax.tree.map(jnp.asarray, scores)
        return rollout, -weights * advantages, jax.device_get(_slopes(scores, Batch(*parts)))


@pytest.mark.parametrize("name", [repr(member) for member in TERMS])
@pytest.mark.parametrize("stored", [True, False])
def test_8_terms_at_ratio_one(name, stored):
    for seed in SEEDS:
        rollout, weighted, slopes = slopes_at_one(seed, stored)
        builder, expected = name.split("(")[0], policy_gradient(name, weighted, rollout.mask)
        if builder == "squared_ratio":
            expected = np.zeros_like(expected)
        elif builder in NO_SURROGATE:
            assert not np.allclose(slopes[name], expected)
            continue
        held = slopes[name] == 0 if builder == "clip_cov" else np.zeros_like(rollout.mask)
        assert builder != "clip_cov" or np.sum(held & rollout.mask) <= 0.1 * rollout.mask.sum() + 1
        same(slopes[name], np.where(held, 0.0, expected))
        assert builder == "squared_ratio" or np.any(expected != 0)


# What these add to the policy gradient where all policies agree, per unit of weight.
ADDED = {
    "tunix.grpo": lambda advantages: 0.04,  # k1 as a loss pushes every token alike
    "tunix.gspo_token": lambda advantages: 0.04,
    "algorithms.vapo": lambda advantages: -0.1 * (advantages > 0),
}


@functools.cache
def on_policy(seed):
    signal, rollout, scores = random_world(seed)
    now = scores.logprobs
    rollout = swap(rollout, logprobs=now, old_logprobs=now, ref_logprobs=now)
    return study(signal, rollout, scores)


@everything
def test_8_algorithms_at_ratio_one(name):
    for seed in SEEDS:
        batches, graded = on_policy(seed)
        batch, objective = batches[name], repr(ALL[name].objective)
        mask, weighted = batch.rollout.mask, -batch.weights * batch.advantages
        expected = policy_gradient(objective, weighted, mask)
        if name in ADDED:
            expected = expected + batch.weights * ADDED[name](batch.advantages)
        if name.endswith(".clip_cov"):
            expected = np.where(batch.prepared, 0.0, expected)
        same(graded[name][0].logprobs, np.where(mask, expected, 0.0))
        assert np.any(expected != 0)


# --- 10. one surrogate in the words of another ----------------------------------------------------


def far_world(seed, *, single=False):
    """Ratios over several orders of magnitude; `single`: completions of one token."""
    signal, rollout, scores = random_world(seed, rows=30)
    rng = np.random.default_rng(seed)
    mask = rollout.mask & (rollout.mask.cumsum(axis=1) == 1) if single else rollout.mask
    shape = mask.shape
    old = np.minimum(rollout.old_logprobs, -1e-3)
    logprobs = old + rng.standard_normal(shape) * rng.choice([0.1, 1, 3], shape)
    rollout, logprobs = swap(rollout, old_logprobs=old), np.minimum(logprobs, -1e-3)
    advantages, weights = np.where(mask, rng.standard_normal((2, *shape)), 0.0)
    parts = (swap(rollout, mask=mask), advantages, np.abs(weights), np.abs(weights), advantages)
    scores, parts = jax.tree.map(jnp.asarray, (swap(scores, logprobs=logprobs), parts))
    return scores, Batch(*parts)


@jax.jit
def value_and_slope(piece, scores, batch):
    value = lambda scores: piece(scores, batch)[0]  # noqa: E731
    slope = jax.grad(lambda scores: jnp.sum(batch.weights * value(scores)))
    return value(scores), slope(scores).logprobs


def agree(a, b, scores, batch):
    jax.tree.map(same, value_and_slope(a, scores, batch), value_and_slope(b, scores, batch))


def with_delta(scores, batch, *, low, high, delta):
    """TRL's two-sided clip, in its own words."""
    advantage, mask = batch.advantages, batch.rollout.mask
    rho = jnp.exp(jnp.where(mask, scores.logprobs - batch.rollout.old_logprobs, 0.0))
    inside = jnp.clip(rho, 1 - low, 1 + high) * advantage
    return -jnp.minimum(jnp.minimum(rho, delta) * advantage, inside), {}


@pytest.mark.parametrize("seed", range(10))
def test_10_dual_clip_is_trls_delta(seed, x64):
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(0.05, 0.5, 2).tolist()
    delta = 1 + high + float(rng.choice([1e-3, 0.5, 5.0]))
    theirs = term(with_delta, low=low, high=high, delta=delta)
    agree(losses.clipped(low, high, dual=delta), theirs, *far_world(seed))


RATIONED = {repr(m): m for m in TERMS if "ratio" in inspect.signature(m.builder).parameters}


@jax.jit
def _with_every_ratio(scores, batch):
    ratios = [None, *(ratio.build() for ratio in RATIOS)]
    forms = {name: [m.build(ratio=ratio) for ratio in ratios] for name, m in RATIONED.items()}
    return {name: [value_and_slope(x, scores, batch) for x in forms[name]] for name in forms}


@functools.cache
def with_every_ratio(seed):
    with jax.enable_x64(True):
        return jax.device_get(_with_every_ratio(*far_world(seed, single=True)))


@pytest.mark.parametrize("name", RATIONED)
def test_10_completions_of_one_token_have_one_ratio(name):
    for seed in range(5):
        first, *others = with_every_ratio(seed)[name]
        for other in others:
            jax.tree.map(same, other, first)


@pytest.mark.parametrize("seed", range(3))
def test_10_gmpo_of_one_token_is_ppo_with_bounds_in_logs(seed, x64):
    low, high = np.random.default_rng(seed).uniform(0.1, 0.6, 2).tolist()
    bounds = {"low": -np.expm1(-low), "high": np.expm1(high)}
    agree(losses.gmpo(low, high), losses.clipped(**bounds), *far_world(seed, single=True))


@pytest.mark.parametrize("seed", range(3))
def test_10_without_a_cap_the_weight_is_the_ratio(seed, x64):
    scores, batch = far_world(seed)
    value, slope = value_and_slope(losses.unclipped(), scores, batch)
    ratio = np.where(batch.rollout.mask, scores.logprobs - batch.rollout.need("old_logprobs"), 0)
    _, plain = value_and_slope(losses.reinforce(), scores, batch)
    same(slope, np.exp(ratio) * plain)
    uncapped = (
        losses.cispo(None),
        losses.cispo_around_one(1, 1e6),
        losses.dppo(1.0, 1.0, max_weight=None),  # no probability moves by more than 1
        losses.clipped(1, 1e6),
    )
    for piece in uncapped:
        jax.tree.map(same, value_and_slope(piece, scores, batch), (value, slope))


# --- 11. estimates of a divergence ----------------------------------------------------------------

# test_kl.py has all options on one distribution; here, random ones.


def estimate(d, estimator):
    return kl_estimate(d[None], estimator)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_11_k3_is_not_negative_and_zero_only_at_zero(dtype, seed):
    rng = np.random.default_rng(seed)
    far = (rng.standard_normal(5000) * 10 ** rng.uniform(-1, 1.3, 5000)).astype(dtype)
    with jax.enable_x64(True):
        value = np.asarray(estimate(jnp.asarray(far), "k3"))
        assert value.dtype == dtype and np.all(value[np.abs(far) > 1e-2] > 0)
        near = jnp.asarray(10 ** rng.uniform(-8, -2, 5000) * rng.choice([-1, 1], 5000), dtype)
        # d + exp(-d) - 1 loses digits near 0; what is lost must not be a negative divergence.
        assert np.all(np.asarray(estimate(near, "k3")) >= 0)
        assert float(estimate(jnp.zeros(1, dtype), "k3")[0]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_11_expectations_over_a_categorical(seed, x64):
    rng = np.random.default_rng(seed)
    logits, ref = jnp.asarray(rng.standard_normal((2, 6)) * 1.5)
    ref = jax.nn.log_softmax(ref)

    def expected(logits, estimator):
        logp = jax.nn.log_softmax(logits)  # tokens drawn from it, the draw not differentiated
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(logp)) * estimate(logp - ref, estimator))

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    same(expected(logits, "k1"), exact(logits))
    same(expected(logits, "k3"), exact(logits))
    same(jax.grad(expected)(logits, "k2"), jax.grad(exact)(logits))
    same(jax.grad(expected)(logits, "k1"), np.zeros(6))
    drawn = rng.choice(6, 200_000, p=np.asarray(jax.nn.softmax(logits)))
    d = np.asarray(jax.nn.log_softmax(logits) - ref)[drawn]
    for sample in (d, np.asarray(estimate(jnp.asarray(d), "k3"))):  # Monte-Carlo
        assert abs(sample.mean() - float(exact(logits))) < 5 * sample.std() / np.sqrt(len(d))


# --- 12. the fused head ---------------------------------------------------------------------------

# Values for all types, float64 gradients and ragged vocabularies are in test_logprobs.py; a
# micro-batch without tokens is in test_update.py. Missing there: gradients of bfloat16 inputs.


@jax.jit
def _head_gradients(hidden, head, targets, weights):
    def loss(implementation, hidden, head):
        logprobs, entropy = implementation(hidden, head, targets, temperature=0.8)
        return jnp.sum(weights[0] * logprobs) + jnp.sum(weights[1] * entropy)

    def of(implementation, *inputs):
        return jax.grad(lambda inputs: loss(implementation, *inputs))(inputs)

    half = of(functools.partial(chunked, size=16), hidden, head)
    return half, of(reference, *(x.astype(jnp.float32) for x in (hidden, head)))


@pytest.mark.parametrize("seed", range(3))
def test_12_gradients_of_half_width_inputs_are_summed_in_float32(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (200, 8), jnp.bfloat16)
    head = jax.random.normal(keys[1], (37, 8), jnp.bfloat16)
    targets = jax.random.randint(keys[2], (200,), 0, 37)
    weights = jax.random.normal(keys[3], (2, 200), jnp.float32)
    for half, full in zip(*_head_gradients(hidden, head, targets, weights), strict=True):
        assert half.dtype == jnp.bfloat16
        # One rounding to 8 bits at the end, and not one for each of 200 tokens.
        wrong = np.asarray(half, np.float64) - np.asarray(full, np.float64)
        assert np.linalg.norm(wrong) < 2.0**-8 * np.linalg.norm(full)


# --- 13. without mismatch the corrections are the identity ----------------------------------------

# Coefficients of another kind than a correction of the mismatch of sampler and trainer.
NO_CORRECTION = {
    "top_entropy()",  # keeps undecided tokens
    "adaptive_entropy",  # a coefficient of the entropy bonus
    "normalised(drop_truncated())",
    "normalised(0.5 * tis() * top_entropy(share=0.5))",
}


@jax.jit
def _factors_of(scores, batch):
    found = {}
    for member in FACTORS:
        piece = member.build()
        prepared = swap(batch, prepared=piece.prepare(batch, piece.init())[0])
        found[repr(member)] = piece(scores, prepared)[0]
    return found


@functools.cache
def factors_without_mismatch(seed):
    _, rollout, scores = random_world(seed)
    old = rollout.old_logprobs
    rollout, scores = swap(rollout, logprobs=old), swap(scores, logprobs=old)
    weights = np.where(rollout.mask, 1.0, 0.0)
    advantages = weights * np.random.default_rng(seed).standard_normal(weights.shape)
    with jax.enable_x64(True):
        parts = jax.tree.map(jnp.asarray, (rollout, advantages, weights, weights))
        scores = jax.tree.map(jnp.asarray, scores)
        return rollout.mask, jax.device_get(_factors_of(scores, Batch(*parts)))


@pytest.mark.parametrize("name", [repr(member) for member in FACTORS])
def test_13_corrections_without_mismatch_are_one(name):
    for seed in SEEDS:
        mask, found = factors_without_mismatch(seed)
        identity = np.array_equal(found[name], np.where(mask, 1.0, 0.0))
        assert identity == (name not in NO_CORRECTION and name.split("(")[0] not in NO_CORRECTION)


def uncorrected(objective):
    """The objective without its factors."""
    match objective:
        case FactorTerm():
            return objective.right
        case AddTerms():
            return uncorrected(objective.left) + uncorrected(objective.right)
    return objective


UNCORRECTED = {name: uncorrected(a.objective) for name, a in ALL.items()}
CORRECTED = [name for name, a in ALL.items() if UNCORRECTED[name] != a.objective]


@jax.jit
def _grade_uncorrected(scores, batches):
    grade = lambda name: jax.grad(as_algorithm(UNCORRECTED[name]).loss, has_aux=True)  # noqa: E731
    return {name: grade(name)(scores, batch)[0] for name, batch in batches.items()}


@functools.cache
def without_mismatch(seed):
    signal, rollout, scores = random_world(seed)
    rollout = swap(rollout, logprobs=rollout.old_logprobs)
    batches, graded = study(signal, rollout, scores)
    plain = in_x64(_grade_uncorrected, scores, {name: batches[name] for name in CORRECTED})
    return graded, plain


@pytest.mark.parametrize("name", CORRECTED)
def test_13_algorithms_without_mismatch_have_their_uncorrected_loss(name):
    for seed in SEEDS:
        graded, plain = without_mismatch(seed)
        jax.tree.map(same, graded[name][0], plain[name])
        assert np.any(plain[name].logprobs != 0)
        mismatched = clean(seed)[1][name][0].logprobs
        assert name != "algorithms.m2po" or not np.allclose(mismatched, plain[name].logprobs)
