"""Named algorithms beyond the six, and the libraries' presets: wiring, golden numbers, loops.

`WIRING` says of what each is made; that the pieces compute what they say is tested elsewhere.
`GOLDEN` has the advantages that the libraries give on one group, worked out by hand in NumPy; the
last part tests what the docstrings claim of one another.
"""

import ast
import dataclasses

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from test_algorithms import graded_world, gradient

from eqrl import algorithms, presets
from eqrl._parse import parse
from eqrl._types import Rollout, Scores


# OpenRLHF's order after the baseline.
LATER = "clip(10.0) | kl_penalty(0.01, limit=10.0) | returns(gap='decay')"
CLAMPED = " | whiten(ddof=0, stabiliser='clamp')"
WIRING = {
    "algorithms.cispo()": ("group_norm()", "cispo()", "token_mean()"),
    "algorithms.clip_cov()": ("group_norm()", "clip_cov()", "token_mean()"),
    "algorithms.dppo()": ("group_norm()", "dppo()", "token_mean()"),
    "algorithms.gdpo(1.0, 0.5)": ("gdpo(1.0, 0.5) | batch_norm()", "clipped()", "sequence_mean()"),
    "algorithms.gmpo()": ("group_norm()", "gmpo()", "sequence_mean()"),
    "algorithms.gpg()": ("gpg()", "reinforce()", "token_mean()"),
    "algorithms.gspo()": (
        "group_norm()",
        "clipped(low=0.0003, high=0.0004, ratio=geometric_ratio())",
        "sequence_mean()",
    ),
    "algorithms.kl_cov()": ("group_norm()", "kl_cov()", "token_mean()"),
    "algorithms.lite_ppo()": ("group_norm(deviation='batch')", "clipped()", "token_mean()"),
    "algorithms.luspo()": (
        "group_norm()",
        "clipped(low=0.0003, high=0.0004, ratio=geometric_ratio())",
        "sequence_sum()",
    ),
    "algorithms.m2po()": ("group_norm()", "m2po() * tis(cap=None) * unclipped()", "token_mean()"),
    "algorithms.max_rl()": ("max_rl()", "reinforce()", "sequence_sum()"),
    "algorithms.opo()": ("opo()", "reinforce()", "sequence_sum()"),
    "algorithms.pkpo(2)": ("pass_at_k(2)", "reinforce()", "sequence_sum()"),
    "algorithms.remax()": ("remax()", "reinforce()", "sequence_sum()"),
    "algorithms.sapo()": ("group_norm()", "sapo()", "sequence_mean()"),
    "algorithms.vapo()": (
        "gae_adaptive() | whiten()",
        "clipped(high=0.28) + 0.5 * value_loss() + 0.1 * positive_nll()",
        "token_mean()",
        "None",
        "gae(lam=1.0) | add_values()",
    ),
    "algorithms.vespo()": ("group_norm()", "vespo()", "token_mean()"),
    "trl.cispo()": ("group_norm(eps=0.0001)", "sequence_mask() * cispo()", "token_mean()"),
    "trl.dr_grpo(8)": (
        "group_center()",
        "sequence_mask() * clipped()",
        "constant_length(8, count_empty=True)",
    ),
    "trl.gdpo(1.0, 0.5)": (
        "gdpo(1.0, 0.5, eps=0.0001) | batch_norm(eps=0.0001)",
        "sequence_mask() * clipped()",
        "token_mean()",
    ),
    "trl.grpo()": ("group_norm(eps=0.0001)", "sequence_mask() * clipped()", "token_mean()"),
    "trl.gspo()": (
        "group_norm(eps=0.0001)",
        "sequence_mask() * clipped(ratio=geometric_ratio())",
        "token_mean()",
    ),
    "trl.lite_ppo()": (
        "group_norm(eps=0.0001, deviation='batch')",
        "sequence_mask() * clipped()",
        "token_mean()",
    ),
    "trl.luspo()": (
        "group_norm(eps=0.0001)",
        "sequence_mask() * clipped(ratio=geometric_ratio())",
        "sequence_sum(count_empty=True)",
    ),
    "trl.vespo()": ("group_norm(eps=0.0001)", "sequence_mask() * vespo()", "token_mean()"),
    "trl.ppo()": (
        "kl_penalty(0.05) | gae() | whiten()",
        "clipped() + 0.1 * value_loss()",
        "token_mean()",
        "None",
        "kl_penalty(0.05) | gae() | add_values()",
    ),
    "trl.rloo()": (
        "kl_penalty(0.05) | rloo()",
        "clipped(ratio=sequence_ratio())",
        "sequence_mean(count_empty=True)",
    ),
    "trl.sapo()": (
        "group_norm(eps=0.0001)",
        "sequence_mask() * sapo()",
        "sequence_mean(count_empty=True)",
    ),
    "verl.cispo()": ("group_norm()", "cispo_around_one(high=0.2)", "token_mean()"),
    "verl.dapo(8, 2)": (
        "overlong(8, 2, capped=False) | group_norm()",
        "clipped(high=0.28, dual=10.0)",
        "token_mean()",
        "drop_constant_groups()",
    ),
    "verl.dr_grpo(8)": ("group_center()", "clipped(dual=3.0)", "constant_length(8)"),
    "verl.gdpo(1.0, 0.5)": (
        "gdpo(1.0, 0.5) | returns() | whiten()",
        "clipped(dual=3.0)",
        "token_mean()",
    ),
    "verl.geo_mean()": (
        "group_norm()",
        "gmpo(low=0.2, high=0.2)",
        "sequence_mean(count_empty=True)",
    ),
    "verl.gpg()": ("gpg()", "reinforce()", "token_mean()"),
    "verl.grpo()": ("group_norm()", "clipped(dual=3.0)", "token_mean()"),
    "verl.grpo_passk(4)": ("pass_at_k(4, eps=1e-06)", "clipped(dual=3.0)", "token_mean()"),
    "verl.gspo()": (
        "group_norm()",
        "clipped(ratio=geometric_token_ratio())",
        "sequence_mean()",
    ),
    "verl.sapo()": ("group_norm()", "sapo()", "sequence_mean()"),
    "verl.clip_cov()": ("group_norm()", "clip_cov()", "token_mean()"),
    "verl.kl_cov()": ("group_norm()", "kl_cov(coef=0.1)", "token_mean()"),
    "verl.dppo()": ("group_norm()", "dppo()", "token_mean()"),
    "verl.opo()": ("opo()", "clipped(dual=3.0)", "token_mean()"),
    "verl.ppo()": (
        "gae(lam=1.0) | whiten()",
        "clipped(dual=3.0) + 1.0 * value_loss(clip=0.5)",
        "token_mean()",
        "None",
        "gae(lam=1.0) | add_values()",
    ),
    "verl.reinforce_pp()": ("returns() | whiten()", "clipped(dual=3.0)", "token_mean()"),
    "verl.reinforce_pp_baseline()": (
        "group_center() | whiten()",
        "clipped(dual=3.0)",
        "token_mean()",
    ),
    "verl.remax()": ("remax()", "clipped(dual=3.0)", "token_mean()"),
    "verl.rloo()": ("rloo()", "clipped(dual=3.0)", "token_mean()"),
    "openrlhf.dr_grpo()": (
        "group_center() | as_score() | " + LATER,
        "clipped()",
        "token_mean()",
    ),
    "openrlhf.grpo()": (
        "group_norm(eps=1e-09) | as_score() | " + LATER,
        "clipped()",
        "token_mean()",
    ),
    "openrlhf.ppo()": (
        "clip(10.0) | kl_penalty(0.01, limit=10.0) | gae(lam=1.0, gap='decay')" + CLAMPED,
        "clipped() + 1.0 * value_loss(clip=0.5)",
        "token_mean()",
        "None",
        "clip(10.0) | kl_penalty(0.01, limit=10.0) | gae(lam=1.0, gap='decay') | add_values()",
    ),
    "openrlhf.reinforce_pp()": (
        LATER + CLAMPED,
        "clipped()",
        "token_mean()",
    ),
    "openrlhf.reinforce_pp_baseline()": (
        "group_center() | as_score() | " + LATER + CLAMPED,
        "clipped()",
        "token_mean()",
    ),
    "openrlhf.rloo()": (
        "rloo() | as_score() | " + LATER,
        "clipped()",
        "token_mean()",
    ),
    "tunix.dapo(8, 2)": (
        "overlong(8, 2, capped=False) | group_norm()",
        "clipped(high=0.28)",
        "token_mean()",
    ),
    "tunix.dr_grpo(8)": ("group_center()", "clipped()", "constant_length(8)"),
    "tunix.grpo()": ("group_norm()", "clipped() + 0.04 * kl(estimator='k1')", "sequence_mean()"),
    "tunix.gspo_token()": (
        "group_norm()",
        "clipped(ratio=geometric_token_ratio()) + 0.04 * kl(estimator='k1')",
        "sequence_mean()",
    ),
    "tunix.ppo()": (
        "kl_penalty(0.04, estimator='k3') | gae() | whiten()",
        "clipped() + 1.0 * value_loss()",
        "token_mean()",
        "None",
        "kl_penalty(0.04, estimator='k3') | gae() | add_values()",
    ),
    "predecessor.dapo()": (
        "group_norm(ddof=0, eps=0.0001) + 0.2 * batch_norm(ddof=0, eps=0.0001)",
        "clipped(high=0.3)",
        "token_mean()",
    ),
    "predecessor.grpo()": ("group_norm(ddof=0, eps=0.0001)", "clipped(high=0.3)", "token_mean()"),
    "predecessor.ppo()": (
        "gae() | whiten(ddof=0, eps=0.0001, stabiliser='outside')",
        "clipped(high=0.3) + 1.0 * value_loss()",
        "token_mean()",
        "None",
        "gae() | add_values()",
    ),
    "predecessor.reinforce()": (
        "batch_norm(ddof=0, eps=0.0001)",
        "clipped(high=0.3)",
        "token_mean()",
    ),
    "predecessor.reinforce_pp()": (
        "rloo() | as_score() | batch_norm(ddof=0, eps=0.0001)",
        "clipped(high=0.3)",
        "token_mean()",
    ),
    "predecessor.rloo()": (
        "rloo() | as_score() | batch_norm(ddof=0, eps=0.0001)",
        "clipped(high=0.3)",
        "token_mean()",
    ),
}
EVERYTHING = pytest.mark.parametrize("call", WIRING)


def build(call: str):
    """The algorithm that `"verl.dapo(8, 2)"` names."""
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    module, name = ast.unparse(node.func.value), node.func.attr
    home = algorithms if module == "algorithms" else getattr(presets, module)
    return getattr(home, name)(*(ast.literal_eval(argument) for argument in node.args))


@EVERYTHING
def test_wiring(call):
    algorithm = build(call)
    parts = (
        algorithm.advantage,
        algorithm.objective,
        algorithm.weighting,
        algorithm.selection,
        algorithm.target,
    )
    expected = WIRING[call] + ("None",) * (5 - len(WIRING[call]))
    assert tuple(map(repr, parts)) == expected
    for part in parts:
        assert part is None or parse(repr(part)) == part


def test_every_preset_is_in_the_table():
    listed = {call.split("(")[0] for call in WIRING}
    for library in ("trl", "verl", "openrlhf", "tunix", "predecessor"):
        module = getattr(presets, library)
        public = {
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        }
        for name in public:
            assert name.startswith("_") or f"{library}.{name}" in listed
    six = {"dapo", "dr_grpo", "grpo", "ppo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"}
    known = {n for n, x in vars(algorithms).items() if callable(x) and n != "Algorithm"}
    assert known - six - {"rloo"} <= {
        call.split(".")[1].split("(")[0] for call in listed_algorithms()
    }


def listed_algorithms():
    return [call for call in WIRING if call.startswith("algorithms.")]


# --- golden advantages ----------------------------------------------------------------------------

REWARD = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
LENGTH = np.array([1, 2, 3, 4, 5])


def group(reward: npt.ArrayLike = REWARD, length: npt.ArrayLike = LENGTH, components=None):
    """One group, a row a completion, the reward on the last of `length` tokens."""
    reward, length = np.atleast_1d(reward), np.atleast_1d(length)
    rows, time = len(reward), int(max(length))
    mask = np.arange(time)[None] < np.asarray(length)[:, None]
    zeros = jnp.zeros((rows, time))
    rewards = np.asarray(reward)[:, None] if components is None else components
    rollout = Rollout(
        tokens=zeros.astype(jnp.int32),
        mask=jnp.asarray(mask),
        positions=jnp.where(mask, jnp.arange(time), -1),
        logprobs=zeros,
        group=jnp.zeros(rows, jnp.int32),
        truncated=jnp.zeros(rows, bool),
        rewards=jnp.asarray(rewards, float),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        greedy_rewards=jnp.full(rows, 0.25),
    )
    signal = np.zeros((rows, time))
    signal[np.arange(rows), np.asarray(length) - 1] = reward
    return jnp.asarray(signal), rollout


def whitened(rows, ddof=1, eps=1e-8, clamp=False, outside=False):
    """Values that stand on every token of a row, standardised over tokens."""
    tokens = np.repeat(rows, LENGTH)
    var = tokens.var(ddof=ddof)
    scale = np.sqrt(max(var, eps) if clamp else var + (0 if outside else eps))
    return (rows - tokens.mean()) / (scale + (eps if outside else 0))


def standard(x, ddof, eps):
    return (x - x.mean()) / (x.std(ddof=ddof) + eps)


CENTRED, LOO = REWARD - 0.4, np.array([0.75, -0.5, -0.5, 0.75, -0.5])
PUBLISHED = np.array([1.095443, -0.730295, -0.730295, 1.095443, -0.730295])  # Appendix A
WITH_1E4 = np.array([1.095245, -0.730163, -0.730163, 1.095245, -0.730163])  # Appendix A, TRL
PREDECESSOR = standard(REWARD, 0, 1e-4)
GOLDEN = {
    "algorithms.gspo()": PUBLISHED,
    "algorithms.lite_ppo()": PUBLISHED,  # one group is the whole batch
    "algorithms.opo()": REWARD - 5 / 15,
    "algorithms.gpg()": 5 / 2 * CENTRED,
    "algorithms.max_rl()": [1.5, -1.0, -1.0, 1.5, -1.0],  # Appendix A
    "algorithms.remax()": REWARD - 0.25,
    "algorithms.pkpo(2)": [0.75, 0, 0, 0.75, 0],  # of 4 partners 3 are wrong
    "trl.grpo()": WITH_1E4,
    "trl.gspo()": WITH_1E4,
    "trl.cispo()": WITH_1E4,
    "trl.sapo()": WITH_1E4,
    "trl.dr_grpo(8)": CENTRED,
    "trl.rloo()": LOO,
    "verl.grpo()": PUBLISHED,
    "verl.geo_mean()": PUBLISHED,
    "verl.dr_grpo(8)": CENTRED,
    "verl.rloo()": LOO,
    "verl.opo()": REWARD - 5 / 15,
    "verl.gpg()": 5 / 2 * CENTRED,
    "verl.remax()": REWARD - 0.25,
    "verl.reinforce_pp()": whitened(REWARD),
    "verl.reinforce_pp_baseline()": whitened(CENTRED),
    "verl.ppo()": whitened(REWARD),  # with a critic that says 0
    "openrlhf.grpo()": standard(REWARD, 1, 1e-9),
    "openrlhf.dr_grpo()": CENTRED,
    "openrlhf.rloo()": LOO,
    "openrlhf.reinforce_pp()": whitened(REWARD, ddof=0, clamp=True),
    "openrlhf.reinforce_pp_baseline()": whitened(CENTRED, ddof=0, clamp=True),
    "openrlhf.ppo()": whitened(REWARD, ddof=0, clamp=True),
    "tunix.grpo()": PUBLISHED,
    "tunix.gspo_token()": PUBLISHED,
    "tunix.dr_grpo(8)": CENTRED,
    "predecessor.grpo()": PREDECESSOR,
    "predecessor.reinforce()": PREDECESSOR,
    "predecessor.dapo()": 1.2 * PREDECESSOR,
    "predecessor.rloo()": standard(LOO, 0, 1e-4),
    "predecessor.reinforce_pp()": standard(LOO, 0, 1e-4),
}


@pytest.mark.parametrize("call", GOLDEN)
def test_golden_advantages(call, x64):
    signal, rollout = group()
    batch, _ = build(call).assign(signal, build(call).init(), rollout)
    expected = np.where(rollout.mask, np.asarray(GOLDEN[call])[:, None], 0.0)
    np.testing.assert_allclose(batch.advantages, expected, atol=2e-6, rtol=0)


def test_golden_of_the_best_of_a_group(x64):
    reward = np.array([3.0, 1.0, 2.0, 0.0])
    signal, rollout = group(reward, [1, 1, 1, 1])
    algorithm = presets.verl.grpo_passk(4)
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    np.testing.assert_allclose(batch.advantages[:, 0], [0.774596, 0, 0, 0], atol=1e-6)


def test_golden_of_decoupled_rewards(x64):
    components = np.stack([REWARD, [3.0, 1.0, 4.0, 1.0, 5.0]], axis=1)
    total = standard(components[:, 0], 1, 1e-4) + 0.5 * standard(components[:, 1], 1, 1e-4)
    signal, rollout = group(components=components)
    for call, expected in {
        "trl.gdpo(1.0, 0.5)": standard(total, 1, 1e-4),
        "verl.gdpo(1.0, 0.5)": whitened(total),
    }.items():
        batch, _ = build(call).assign(signal, build(call).init(), rollout)
        expected = np.where(rollout.mask, expected[:, None], 0.0)
        np.testing.assert_allclose(batch.advantages, expected, atol=3e-4)


@pytest.mark.parametrize("call, past", [("verl.dapo(8, 2)", -1.5), ("tunix.dapo(8, 2)", -1.5)])
def test_the_length_penalty_has_no_cap(call, past, x64):
    signal, rollout = group(np.zeros(2), [5, 9])
    rollout = dataclasses.replace(rollout, rewards=jnp.asarray([[0.0], [1.0]]))
    batch, _ = build(call).assign(signal, build(call).init(), rollout)
    shaped = np.array([0.0, past])
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(batch.advantages[:, 0], expected, rtol=1e-9)


# Appendix A: log-ratios of two completions, the second of two tokens, with advantages 1 and -1.
MOVED = np.array([[0.3, -0.1, 0.2, 0.0], [-0.4, 0.1, 0.0, 0.0]])
SEEN = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
SIDE = np.array([[1.0], [-1.0]])
VALUES = {
    "algorithms.gspo()": [[-1.0004], [0.9997]],
    "algorithms.luspo()": [[-1.0004], [0.9997]],
    "trl.gspo()": [[-1.105171], [0.860708]],  # clip 0.2: not held
    "verl.gspo()": [[-1.105171], [0.860708]],
    "algorithms.gmpo()": [[-1.105171], [0.860708]],
    "verl.geo_mean()": [[-1.077884], [0.951229]],
    "algorithms.sapo()": -SIDE * [[2.346333, 1.904909, 2.220503, 2.0], [1.578335, 2.009826, 0, 0]],
    "trl.sapo()": -SIDE * [[2.346333, 1.904909, 2.220503, 2.0], [1.578335, 2.009826, 0, 0]],
    "verl.sapo()": -SIDE * [[2.346333, 1.904909, 2.220503, 2.0], [1.578335, 2.009826, 0, 0]],
    "algorithms.cispo()": -SIDE * [[1.349859, 0.904837, 1.221403, 1.0], [0.67032, 1.105171, 0, 0]],
    "trl.cispo()": -SIDE * [[1.349859, 0.904837, 1.221403, 1.0], [0.67032, 1.105171, 0, 0]],
    "verl.cispo()": -SIDE * [[1.2, 0.904837, 1.2, 1.0], [0.8, 1.105171, 0, 0]],
    "verl.grpo()": [[-1.2, -0.904837, -1.2, -1.0], [0.8, 1.105171, 0, 0]],
    "tunix.grpo()": [[-1.2, -0.904837, -1.2, -1.0], [0.8, 1.105171, 0, 0]],
    "tunix.dapo(8, 2)": [[-1.28, -0.904837, -1.221403, -1.0], [0.8, 1.105171, 0, 0]],
    "predecessor.grpo()": [[-1.3, -0.904837, -1.221403, -1.0], [0.8, 1.105171, 0, 0]],
    "openrlhf.rloo()": [[-1.2, -0.904837, -1.2, -1.0], [0.8, 1.105171, 0, 0]],
    "trl.rloo()": [[-1.2], [0.8]],  # products e^.4 and e^-.3, both held
}


@pytest.mark.parametrize("call", VALUES)
def test_golden_values_of_the_objectives(call, x64):
    signal, rollout = group([1.0, 0.0], [4, 2])
    batch, _ = build(call).assign(signal, build(call).init(), rollout)
    np.testing.assert_array_equal(rollout.mask, SEEN)
    batch = dataclasses.replace(batch, advantages=jnp.asarray(SIDE * SEEN))
    scores = Scores(jnp.asarray(MOVED), jnp.zeros((2, 4)))
    # The reference and the sampler agree with the old policy here.
    objective = build(call).objective
    objective = objective.left if "kl(" in repr(objective) else objective
    value, _ = objective(scores, batch)
    expected = np.where(SEEN, np.asarray(VALUES[call]), 0.0)
    np.testing.assert_allclose(value, expected, atol=1e-6, rtol=0)


# --- what they say of one another -----------------------------------------------------------------


def test_openrlhf_lets_a_token_bear_later_kl(x64):
    # Appendix A: A = .6, k1 = [.1 -.2 . .05 .3], coefficient .01, summed from the end.
    mask = np.array([[1, 1, 0, 1, 1, 0]] * 2, bool)
    kl = np.array([0.1, -0.2, 0.0, 0.05, 0.3, 0.0])
    signal, rollout = group([1.2, 0.0], [6, 6])
    signal = jnp.zeros_like(signal).at[0, 4].set(1.2)
    rollout = dataclasses.replace(
        rollout, mask=jnp.asarray(mask), ref_logprobs=-jnp.stack([kl, kl])
    )
    algorithm = presets.openrlhf.dr_grpo()
    batch, _ = algorithm.assign(signal, algorithm.init(), rollout)
    golden = [0.5975, 0.5985, 0.0, 0.5965, 0.597, 0.0]
    np.testing.assert_allclose(batch.advantages[0], golden, atol=1e-12)


def test_on_the_first_update_the_clip_of_rloo_is_inert(x64):
    signal, rollout, scores = graded_world(on_policy=True)
    # All rows live: TRL counts empty ones in the mean.
    mask = rollout.mask.at[:, 0].set(True)
    rollout = dataclasses.replace(rollout, mask=mask)
    paper = gradient(algorithms.rloo(), signal, rollout, scores)
    np.testing.assert_allclose(
        gradient(presets.trl.rloo(), signal, rollout, scores), paper, rtol=1e-12, atol=1e-15
    )


def test_the_token_form_of_gspo_has_the_gradient_of_the_sequence_form(x64):
    signal, rollout, scores = graded_world()
    old = rollout.need("old_logprobs")
    scores = dataclasses.replace(scores, logprobs=old + 1e-4 * (scores.logprobs - old))
    paper = gradient(algorithms.gspo(), signal, rollout, scores)
    assert np.any(np.asarray(paper) != 0)
    np.testing.assert_allclose(
        gradient(presets.verl.gspo(3e-4, 4e-4), signal, rollout, scores),
        paper,
        rtol=1e-10,
        atol=1e-15,
    )


def test_empty_rows_shrink_the_step_only_where_they_count(x64):
    signal, rollout, scores = graded_world()  # 9 of 11 rows are live
    rollout = dataclasses.replace(rollout, logprobs=rollout.old_logprobs)
    theirs = gradient(presets.trl.dr_grpo(8), signal, rollout, scores)
    paper = gradient(algorithms.dr_grpo(8), signal, rollout, scores)
    np.testing.assert_allclose(theirs, paper * 9 / 11, rtol=1e-12)


def test_sapo_of_trl_differs_in_eps_and_empty_rows_only(x64):
    signal, rollout, scores = graded_world()
    rollout = dataclasses.replace(rollout, logprobs=rollout.old_logprobs)
    theirs = gradient(presets.trl.sapo(), signal, rollout, scores)
    paper = gradient(algorithms.sapo(), signal, rollout, scores)
    np.testing.assert_allclose(theirs, paper * 9 / 11, rtol=2e-3)
