"""Completions of several stretches: what `Turns` samples, and what of it trains."""

import dataclasses
import pathlib
import re
import typing
from collections.abc import Sequence

import calculator
import config as cli
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from build import build_algorithm
from helpers import tiny_model
from options import AlgorithmName
from word_problems import apply, problems

import eqrl
from eqrl import data, models, sharding
from eqrl._pack import compact
from eqrl._prompts import pad_prompts
from eqrl._score import score
from eqrl._types import Rollout
from eqrl.samplers import Decoder, Sampling, Turns, draw, text_tool


STOP, CALLS = 1, (5, 11, 17, 23, 29, 35)
PROMPTS, IDS, WIDTH = [[3, 4, 6], [7], [8, 9, 10, 12, 13, 14], [2, 2]], [5, 3, 900, 0], 8
SAMPLING = Sampling(3, 14, (STOP,))
TURNS, REPLY = 3, 4
MODEL = tiny_model()
KEY = jr.key(3)


def respond(parts: list[list[int]]) -> list[int] | None:
    """0 to 4 tokens that follow from all that was said; for some calls none, which ends the row."""
    total = sum(map(sum, parts))
    return None if total % 7 == 0 else [(total + i) % 37 for i in range(total % 5)]


def make(sampler=None, answer=respond, calls=CALLS, turns=TURNS, max_reply=REPLY) -> Turns:
    return Turns(sampler or Decoder(), answer, calls, turns=turns, max_reply=max_reply)


def prompts(chosen: Sequence[int] = range(4), width=WIDTH):
    return pad_prompts([PROMPTS[i] for i in chosen], [IDS[i] for i in chosen], width=width)


def ask(sampler, sampling=SAMPLING, batch=None, key=KEY) -> Rollout:
    return sampler(MODEL, prompts() if batch is None else batch, sampling, key=key)


def spans(rollout: Rollout, width=WIDTH) -> list[list[tuple[bool, list[int]]]]:
    """What follows the prompt in each row: runs of tokens, and whether the policy chose them."""
    rows = []
    for tokens, mask, positions in zip(
        *(np.asarray(x)[:, width:] for x in (rollout.tokens, rollout.mask, rollout.positions)),
        strict=True,
    ):
        runs: list[tuple[bool, list[int]]] = []
        for token, chosen, position in zip(tokens, mask, positions, strict=True):
            if position < 0:
                continue
            if not runs or runs[-1][0] != chosen:
                runs.append((bool(chosen), []))
            runs[-1][1].append(int(token))
        rows.append(runs)
    return rows


def said(rollout: Rollout, width=WIDTH) -> list[list[int]]:
    """All tokens after the prompt."""
    return [[token for _, run in runs for token in run] for runs in spans(rollout, width)]


def chosen(rollout: Rollout) -> list[int]:
    """How many tokens the policy chose in each row."""
    return np.asarray(rollout.mask).sum(axis=1).tolist()


# --- what is sampled ------------------------------------------------------------------------------


@jax.jit
def _logits(tokens, length):
    steps = jnp.arange(tokens.shape[0])
    positions = jnp.where(steps < length, steps, -1)
    return MODEL.unembedding @ MODEL(tokens[None], positions[None])[0, length - 1]


def one_by_one(prompt: list[int], id: int, sample: int, sampling: Sampling):
    """A row, token by token: the whole model on all tokens so far, no cache, no neighbours."""
    parts, logprobs, budget, turn = [list(prompt)], [], sampling.max_tokens, -1
    while True:
        if turn < 0:
            row_key = jr.fold_in(jr.fold_in(KEY, id), sample)
        else:
            later = jr.fold_in(jr.fold_in(KEY, np.uint32(2**32 - 1)), turn)
            row_key = jr.fold_in(jr.fold_in(later, id * sampling.samples + sample), 0)
        parts.append([])
        while budget and (not parts[-1] or parts[-1][-1] not in (STOP, *CALLS)):
            row = sum(parts, [])
            padded = jnp.asarray(np.resize(row + [0] * (64 - len(row)), 64))
            uniform = jr.uniform(jr.fold_in(row_key, len(parts[-1])), (1,))
            token, logprob = draw(_logits(padded, len(row))[None], uniform)
            parts[-1].append(int(token[0]))
            logprobs.append(float(logprob[0]))
            budget -= 1
        turn += 1
        called = parts[-1][-1] in CALLS and budget and turn < TURNS
        reply = respond(parts) if called else None
        if reply is None:
            return parts, logprobs
        parts.append(reply)


def test_a_rollout_is_what_a_plain_loop_samples():
    rollout = ask(make())
    seen = {"stretches": set(), "cut": 0, "stopped": 0}
    for row, (everything, cut) in enumerate(zip(said(rollout), rollout.truncated, strict=True)):
        prompt = row // SAMPLING.samples
        parts, logprobs = one_by_one(PROMPTS[prompt], IDS[prompt], row % 3, SAMPLING)
        assert everything == sum(parts[1:], [])
        mask = [i % 2 == 0 for i, part in enumerate(parts[1:]) for _ in part]
        assert np.asarray(rollout.mask)[row, WIDTH : WIDTH + len(mask)].tolist() == mask
        found = np.asarray(rollout.logprobs)[row][np.asarray(rollout.mask)[row]]
        np.testing.assert_allclose(found, logprobs, atol=1e-4)
        assert bool(cut) == (parts[-1][-1] != STOP)
        seen["stretches"].add(len(parts) // 2)
        seen["cut"] += len(logprobs) == SAMPLING.max_tokens
        seen["stopped"] += parts[-1][-1] == STOP
    # The world must hold the cases: one to four stretches, a budget that ends a row, a stop.
    assert seen["stretches"] == {1, 2, 3, 4} and seen["cut"] and seen["stopped"], seen


def test_logprobs_are_the_policys_own_in_every_stretch():
    for temperature, turns in ((1.0, TURNS), (0.6, 1)):
        sampling = dataclasses.replace(SAMPLING, temperature=temperature)
        packed = compact(ask(make(turns=turns), sampling), step=8)
        mask = np.asarray(packed.mask)
        own = np.asarray(score(MODEL, packed, temperature=temperature).logprobs)
        np.testing.assert_allclose(np.asarray(packed.logprobs)[mask], own[mask], atol=1e-4)
        assert np.all(np.asarray(packed.logprobs)[~mask] == 0)


def test_replies_are_the_very_tokens_and_never_masked():
    asked = []

    def noted(parts):
        reply = respond(parts)
        asked.append((parts, reply))
        return reply

    rollout = ask(make(answer=noted))
    rows = list(zip(np.repeat(range(4), 3), spans(rollout), strict=True))
    answered = [(parts, reply) for parts, reply in asked if reply]
    replies = sum(len([run for mine, run in runs if not mine]) for _, runs in rows)
    assert replies == len(answered) > 5
    for parts, reply in answered:
        so_far = sum(parts[1:], [])
        assert parts[-1][-1] in CALLS
        match = [
            runs
            for prompt, runs in rows
            if PROMPTS[prompt] == parts[0]
            and sum((run for _, run in runs), [])[: len(so_far) + len(reply)] == so_far + reply
        ]
        assert any((False, reply) in runs for runs in match)


def test_the_layout_is_the_usual_one():
    rollout = ask(make())
    width = WIDTH + SAMPLING.max_tokens + TURNS * REPLY
    assert rollout.tokens.shape == (12, width)
    assert np.asarray(rollout.group).tolist() == np.repeat(range(0, 12, 3), 3).tolist()
    packed = compact(rollout, step=4)
    assert packed.tokens.shape[1] < width
    for row, positions in enumerate(np.asarray(packed.positions)):
        used = positions[positions >= 0]
        assert used.tolist() == list(range(len(used)))
        prompt = PROMPTS[row // 3]
        assert np.asarray(packed.tokens)[row, : len(prompt)].tolist() == prompt
        assert not np.asarray(packed.mask)[row, : len(prompt)].any()
    plain = ask(Decoder())
    for field in dataclasses.fields(Rollout):
        ours, theirs = getattr(rollout, field.name), getattr(plain, field.name)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.dtype == theirs.dtype, field.name


def test_without_a_call_it_is_the_plain_sampler_to_the_bit():
    plain = ask(Decoder())
    unused = sorted(set(range(2, 37)) - set(np.asarray(plain.tokens).ravel().tolist()))
    assert unused, "every token was sampled; take another key"
    ours = ask(make(calls=tuple(unused)))
    columns = plain.tokens.shape[1]
    for name, empty in (("tokens", 0), ("mask", False), ("positions", -1), ("logprobs", 0.0)):
        found = np.asarray(getattr(ours, name))
        np.testing.assert_array_equal(found[:, :columns], getattr(plain, name))
        np.testing.assert_array_equal(found[:, columns:], np.full_like(found[:, columns:], empty))
    np.testing.assert_array_equal(ours.truncated, plain.truncated)
    np.testing.assert_array_equal(ours.group, plain.group)


def test_rows_depend_on_key_and_prompt_alone():
    whole = said(ask(make()))
    assert said(ask(make())) == whole
    part = said(ask(make(), batch=prompts([2, 0])))
    assert part == [row for i in (2, 0) for row in whole[3 * i : 3 * i + 3]]
    assert said(ask(make(), key=jr.key(4))) != whole


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 6])
def test_the_budget_counts_what_the_policy_chose(budget):
    asked = []

    def noted(parts):
        asked.append(sum(map(len, parts[1::2])))
        return [2, 2, 2, 2]

    sampler = make(answer=noted, turns=1)
    rollout = ask(sampler, dataclasses.replace(SAMPLING, max_tokens=budget))
    assert max(chosen(rollout)) == budget
    assert all(spent < budget for spent in asked), "asked for a reply that nothing may follow"
    for runs, cut in zip(spans(rollout), rollout.truncated, strict=True):
        assert runs[-1][0], "a row ends with the policy's own token"
        assert bool(cut) == (runs[-1][1][-1] != STOP)
    # The row is the same up to where the smaller budget cut it, in mid-stretch as well.
    full = said(ask(sampler))
    ours = said(rollout)
    assert all(long[: len(short)] == short for long, short in zip(full, ours, strict=True))
    if budget > 1:
        ends = [runs[-1][1][-1] for runs in spans(rollout)]
        ended = zip(ends, chosen(rollout), strict=True)
        assert any(n == budget and end not in (STOP, *CALLS) for end, n in ended)


@pytest.mark.parametrize("turns", [1, 2])
def test_turns_bound_the_replies(turns):
    rollout = ask(make(answer=lambda parts: [2], turns=turns))
    replies = [sum(not mine for mine, _ in runs) for runs in spans(rollout)]
    assert max(replies) == turns
    ends = [runs[-1][1][-1] for runs in spans(rollout)]
    spent = zip(ends, chosen(rollout), strict=True)
    unanswered = [end in CALLS and count < SAMPLING.max_tokens for end, count in spent]
    assert any(unanswered)
    for end, cut in zip(ends, rollout.truncated, strict=True):
        assert bool(cut) == (end != STOP)


def test_no_reply_ends_the_row():
    rollout = ask(make(answer=lambda parts: None))
    plain = ask(Decoder(), dataclasses.replace(SAMPLING, stop_ids=(STOP, *CALLS)))
    assert said(rollout) == said(plain)
    ends = [row[-1] for row in said(rollout)]
    assert np.asarray(rollout.truncated).tolist() == [end != STOP for end in ends]
    assert any(end in CALLS for end in ends)


def test_a_stop_token_may_be_a_call():
    """A chat: the environment speaks after each message, until it has nothing more to say."""
    stops = (STOP, *CALLS)
    sampling = dataclasses.replace(SAMPLING, stop_ids=stops)
    rollout = ask(make(answer=lambda parts: [2] if len(parts) < 4 else None, calls=stops), sampling)
    replies = [sum(not mine for mine, _ in runs) for runs in spans(rollout)]
    assert max(replies) == 1
    ends = [runs[-1][1][-1] for runs in spans(rollout)]
    assert np.asarray(rollout.truncated).tolist() == [end not in stops for end in ends]
    assert any(n and not cut for n, cut in zip(replies, rollout.truncated, strict=True))


def test_few_shapes_are_asked_for():
    shapes = []

    class Spy:
        def __call__(self, policy, prompts, sampling, *, key):
            shapes.append((prompts.tokens.shape, sampling))
            return Decoder()(policy, prompts, sampling, key=key)

    for seed in range(3):
        ask(make(Spy()), key=jr.key(seed))
    first, *later = [(rows, width, s) for (rows, width), s in shapes]
    assert first[:2] == (4, WIDTH) and (first[2].samples, first[2].max_tokens) == (3, 14)
    counts = {rows for rows, _, s in later if s.samples == 1}
    assert 1 < len(counts) and counts <= {12, 6, 3, 2}
    asked = {s.max_tokens for _, _, s in later if s.samples == 1}
    assert 1 < len(asked) and asked <= {14, 7, 4, 2}
    assert {width for _, width, s in later if s.samples == 1} <= {WIDTH + 14 + TURNS * REPLY}
    assert {s.stop_ids for _, _, s in later} == {(STOP, *CALLS)}


def test_on_a_mesh_it_samples_the_same():
    mesh = sharding.make_mesh("data=2,fsdp=2", jax.devices()[:4])
    policy = sharding.place(MODEL, mesh, MODEL.architecture)
    placed = []

    class Spy:
        def __call__(self, policy, prompts, sampling, *, key):
            placed.append(prompts.tokens.sharding.shard_shape(prompts.tokens.shape)[0])
            return Decoder()(policy, prompts, sampling, key=key)

    with jax.set_mesh(mesh):
        batch = sharding.place_rows(prompts(), mesh)
        rollout = make(Spy(), turns=1)(policy, batch, SAMPLING, key=KEY)
    assert said(rollout) == said(ask(make(turns=1)))
    assert placed == [1, 3]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: make(turns=0), "turns=0 must be at least 1"),
        (lambda: make(max_reply=0), "max_reply=0 must be at least 1"),
        (lambda: make(calls=()), "call_ids is empty"),
        (lambda: make(make()), "sampler takes turns already"),
        (lambda: ask(make(calls=(37,))), r"call_ids=\(37,\) must be tokens from 0 to 36"),
    ],
)
def test_bad_arguments_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    "reply, words",
    [([2] * 5, "5 tokens but max_reply is 4"), ([2, 37], "holds 37"), ([-1, 2], "no token")],
)
def test_bad_replies_are_refused(reply, words):
    with pytest.raises(RuntimeError, match=words):
        ask(make(answer=lambda parts: reply))


# --- text -----------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one letter a token."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [99] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return "".join(chr(i) for i in ids if i > 31 or not skip_special_tokens)


def test_a_text_tool_reads_the_last_stretch_alone():
    heard = []

    def tool(text):
        heard.append(text)
        return None if "x" in text else text.upper()

    answer = text_tool(Letters(), tool)
    assert answer([[1], [ord("a"), 2], [3, 4], [ord("b"), 5]]) == [ord("B"), 5]
    assert answer([[1], [ord("x")]]) is None
    assert heard == ["b\x05", "x"]


def test_texts_of_completions_hold_the_replies():
    text = lambda s: [ord(c) for c in s]  # noqa: E731
    tokens = np.array([text("pq_ab=12c") + [2, 0], text("p__d") + [0] * 7, text("pqr") + [0] * 8])
    mask = np.zeros(tokens.shape, bool)
    mask[0, 3:6] = mask[0, 8:10] = mask[1, 3] = True
    positions = np.array(
        [[0, 1, -1, *range(2, 9), -1], [0, -1, -1, 1] + [-1] * 7, [0, 1, 2] + [-1] * 8]
    )
    decode = data.decode_completions
    assert decode(tokens, mask, Letters(), positions=positions) == ["ab=12c", "d", ""]
    assert decode(tokens, mask, Letters()) == ["ab=c", "d", ""]
    # Holes may be anywhere, and where the policy chose all of it nothing changes.
    whole = ask(Decoder())
    found = [np.asarray(x) for x in (whole.tokens + 40, whole.mask, whole.positions)]
    with_positions = decode(found[0], found[1], Letters(), positions=found[2])
    assert with_positions == decode(found[0], found[1], Letters())


# --- training -------------------------------------------------------------------------------------

NAMES = typing.get_args(AlgorithmName)
MEASURED = frozenset({"old_logprobs", "old_entropy", "sum_pi_squared", "ref_logprobs", "values"})


@pytest.fixture(scope="module")
def measured() -> Rollout:
    """A rollout of several turns with every field that an algorithm may read."""
    rollout = compact(ask(make()), step=8)
    count = rollout.tokens.shape[0]
    rewards = jnp.asarray(np.random.default_rng(0).integers(0, 2, (count, 2)), jnp.float32)
    rollout = dataclasses.replace(
        rollout,
        rewards=rewards,
        greedy_rewards=jnp.full((count,), 0.5),
        version=jnp.zeros((count,), jnp.int32),
    )
    return eqrl.annotate(
        rollout,
        MEASURED,
        policy=MODEL,
        reference=tiny_model(jr.key(8)),
        critic=models.ValueModel.init(MODEL),
    )


def spoiled(rollout: Rollout) -> Rollout:
    """NaN and infinities on every float that is not the policy's own token."""
    mask = np.asarray(rollout.mask)
    garbage = np.resize([np.nan, np.inf, -np.inf, 1e30], mask.shape).astype(np.float32)

    def spoil(x):
        if x.shape != mask.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(rollout.mask, x, garbage)

    return jax.tree.map(spoil, rollout)


def built(name: str) -> eqrl.Algorithm:
    found = cli.parse(["--algo.name", name, "--rollout.samples", "3", "--rollout.max-tokens", "14"])
    reward = dataclasses.replace(found.reward, weights=(1.0, 1.0))
    return build_algorithm(dataclasses.replace(found, reward=reward))


def assigned(algorithm: eqrl.Algorithm, rollout: Rollout):
    signal = eqrl.outcome(jnp.sum(rollout.need("rewards"), axis=1), rollout.mask)
    return algorithm.assign(signal, algorithm.init(), rollout)[0]


@jax.jit
def every_gradient(rollout: Rollout):
    """Gradients of policy and critic by every algorithm; the models run once."""
    pair = MODEL, models.ValueModel.init(MODEL)
    scores, back = jax.vjp(lambda pair: score(pair[0], rollout, critic=pair[1]), pair)
    grades = {}
    for name in NAMES:
        algorithm = built(name)
        batch = assigned(algorithm, rollout)
        grades[name] = jax.grad(algorithm.loss, has_aux=True)(scores, batch)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(grade for grade, _ in grades.values()))
    gradients = jax.vmap(lambda grade: back(grade)[0])(stacked)
    return gradients, {name: metrics for name, (_, metrics) in grades.items()}


def test_every_algorithm_trains_on_turns_and_replies_change_nothing(measured):
    gradients, metrics = jax.device_get(every_gradient(measured))
    for index, name in enumerate(NAMES):
        of_policy, of_critic = jax.tree.map(lambda x, i=index: x[i], gradients)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((of_policy, of_critic))), name
        assert any(np.any(x != 0) for x in jax.tree.leaves(of_policy)), name
        learns = "values" in built(name).requires
        assert learns == any(np.any(x != 0) for x in jax.tree.leaves(of_critic)), name
    dirty = jax.device_get(every_gradient(spoiled(measured)))
    jax.tree.map(np.testing.assert_array_equal, dirty, (gradients, metrics))


def trained(algorithm: eqrl.Algorithm, rollout: Rollout):
    """The policy after one step, its metrics, and whether it was skipped."""
    optimizer = optax.sgd(1e-2)
    state = eqrl.init(MODEL, algorithm, optimizer)
    batch = jax.jit(assigned)(algorithm, rollout)
    state, metrics = eqrl.update(state, batch, algorithm, optimizer)
    return jax.device_get((state.policy, metrics, state.skipped))


def test_an_update_moves_the_policy_and_ignores_replies(measured):
    clean = trained(built("rloo"), measured)
    policy, metrics, skipped = clean
    assert skipped == 0 and np.isfinite(metrics["optim/grad_norm"]), metrics
    assert np.any(policy.embedding != np.asarray(MODEL.embedding))
    jax.tree.map(np.testing.assert_array_equal, trained(built("rloo"), spoiled(measured)), clean)


# --- the example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, written",
    [
        ("First 3 * 4 =", " 12"),
        (". Then 12 - 15=", " -3"),
        ("so (2 + 3) * 4 / 10 =", " 2"),
        ("it is 7 / 2 =", ""),
        ("it is 7 / 0 =", ""),
        ("3 apples - 2 =", ""),
        ("and 5 =", ""),
        ("9 ** 9 ** 9 =", ""),
        ("7 // 2 =", ""),
        ("3 + (4 =", ""),
        ("3 + 4 = 7, so", ""),
        ("print(2) =", ""),
        ("999999 * 999999 =", ""),
    ],
)
def test_the_calculator_writes_whole_numbers_only(said, written):
    assert calculator.result(said) == written


def test_the_demo_model_uses_the_calculator():
    folder = pathlib.Path(calculator.__file__).parent / "demo_model"
    loaded = models.load(folder)
    tokenizer = models.load_tokenizer(loaded)
    records = problems("held_out", 16)
    rows = data.encode_prompts([record["question"] for record in records], tokenizer)
    batch, sampling = pad_prompts(rows, range(16), width=48), Sampling(4, 40, loaded.stop_ids)
    config = cli.parse(["--turns", "2"], cls=calculator.CalculatorConfig)
    task = calculator.build(config)
    assert task.around is not None
    wrong = []
    for sampler in (Decoder(), task.around(Decoder(), tokenizer)):
        rollout = sampler(loaded.model, batch, sampling, key=jr.key(0))
        found = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.positions))
        tokens, mask, positions = found
        texts = data.decode_completions(tokens, mask, tokenizer, positions=positions)
        steps = [s for t in texts for s in re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)", t)]
        assert len(steps) > 64
        wrong.append(sum(apply(int(a), how, int(b)) != int(c) for a, how, b, c in steps))
    assert wrong[0] > 0 and wrong[1] == 0
    plain = cli.parse(["--no-calculator"], cls=calculator.CalculatorConfig)
    assert calculator.build(plain).around is None
