"""The sampler contract, on every backend of `members_samplers.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members_samplers import BACKENDS, Backend

from eqrl._pack import compact
from eqrl._prompts import pad_prompts
from eqrl._score import score
from eqrl._types import Rollout
from eqrl.models import Transformer
from eqrl.samplers import Sampler, Sampling


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]
STOP = 1
pytestmark = pytest.mark.parametrize("backend", BACKENDS, ids=lambda row: row.name, scope="module")


@pytest.fixture(scope="module")
def sampler(backend: Backend):
    reason = backend.missing()
    if reason is not None:
        pytest.skip(reason)
    with backend.open() as sampler:
        yield sampler


@pytest.fixture(scope="module")
def model(backend: Backend) -> Transformer:
    return backend.model(jax.random.key(7))


def _prompts(rows=PROMPTS, ids=None, width=8):
    return pad_prompts(rows, range(len(rows)) if ids is None else ids, width=width)


def _texts(rollout: Rollout) -> list[tuple[int, ...]]:
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return [tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


def _own(model: Transformer, rollout: Rollout, temperature: float):
    """The policy's own log-probs and entropies of the masked tokens, and the sampler's."""
    packed = compact(rollout, step=8)
    scores = score(model, packed, temperature=temperature or 1.0)
    mask = np.asarray(packed.mask)
    return tuple(np.asarray(x)[mask] for x in (scores.logprobs, scores.entropy, packed.logprobs))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_logprobs_are_the_policys_own_over_more_than_fifty_tokens(
    backend, sampler: Sampler, model, temperature
):
    sampling = Sampling(3, 60, (STOP,), temperature)
    rollout = sampler(model, _prompts(), sampling, key=jax.random.key(0))
    assert np.asarray(rollout.mask).sum(axis=1).max() > 50
    own, _, theirs = _own(model, rollout, temperature)
    assert own.std() > 0.1 or temperature == 0
    np.testing.assert_allclose(theirs, own, atol=backend.logprob_error)


def test_logprobs_are_the_new_policys_after_an_update(backend, sampler: Sampler, model):
    """And those of the old one are far off, so the weights have really changed."""
    new = backend.model(jax.random.key(8))
    sampling = Sampling(2, 20, (STOP,))
    for policy, other in ((model, new), (new, model), (model, new)):
        rollout = sampler(policy, _prompts(), sampling, key=jax.random.key(0))
        own, _, theirs = _own(policy, rollout, 1.0)
        np.testing.assert_allclose(theirs, own, atol=backend.logprob_error)
        wrong, _, _ = _own(other, rollout, 1.0)
        assert np.abs(theirs - wrong).mean() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_whole_distribution(sampler: Sampler, model, temperature):
    """A top-k or top-p somewhere, or another temperature, shows in the frequencies."""
    sampling = Sampling(512, 1, (STOP,), temperature)
    rollout = sampler(model, _prompts([[3, 4, 5]], width=4), sampling, key=jax.random.key(5))
    hidden = model(jnp.asarray([[3, 4, 5]]), jnp.arange(3)[None])[0, -1]
    p = np.asarray(jax.nn.softmax(model.unembedding @ hidden / temperature), np.float64)
    drawn = np.array([text[0] for text in _texts(rollout)])
    seen, expected = np.bincount(drawn, minlength=p.size), 512 * p
    often = expected > 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (seen, expected)]
    chi2 = np.sum((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1e-9))
    cells = often.sum()
    assert chi2 < cells + 6 * np.sqrt(2 * cells), (pooled[0], pooled[1])


def test_greedy_takes_the_argmax(sampler: Sampler, model):
    sampling = Sampling(1, 5, (STOP,), 0)
    rollout = sampler(model, _prompts(PROMPTS[:2]), sampling, key=jax.random.key(0))
    for prompt, completion in zip(PROMPTS[:2], _texts(rollout), strict=True):
        row = np.array([*prompt, *completion])
        padded = np.pad(row, (0, 16 - row.size))[None]
        positions = np.where(np.arange(16) < row.size, np.arange(16), -1)[None]
        hidden = model(jnp.asarray(padded), jnp.asarray(positions))[0]
        best = np.asarray(jnp.argmax(hidden @ model.unembedding.T, axis=1))
        np.testing.assert_array_equal(best[len(prompt) - 1 : row.size - 1], completion)


def test_stop_tokens_end_a_row_and_stay_in_the_mask(sampler: Sampler, model):
    vocab = model.architecture.vocab_size
    stops = (STOP, *range(vocab // 2, vocab))
    sampling = Sampling(16, 10, stops)
    rollout = sampler(model, _prompts(), sampling, key=jax.random.key(1))
    texts, truncated = _texts(rollout), np.asarray(rollout.truncated)
    assert any(len(text) == 1 for text in texts), "no row stopped at its first token"
    assert any(len(text) > 1 for text in texts)
    for text, cut in zip(texts, truncated, strict=True):
        assert all(token not in stops for token in text[:-1])
        assert cut == (text[-1] not in stops)
        assert not cut or len(text) == 10


def test_the_same_key_gives_the_same_rollout_for_any_split_of_the_batch(
    backend, sampler: Sampler, model
):
    sampling, key = Sampling(4, 12, (STOP,)), jax.random.key(2)
    ids = [5, 3, 9, 0]
    whole = sampler(model, _prompts(ids=ids), sampling, key=key)
    again = sampler(model, _prompts(ids=ids, width=19), sampling, key=key)
    assert _texts(again) == _texts(whole)
    np.testing.assert_allclose(
        again.logprobs[:, 19:], whole.logprobs[:, 8:], atol=backend.same_numbers
    )
    for split in ([0, 2], [3, 1]):
        part = _prompts([PROMPTS[i] for i in split], ids=[ids[i] for i in split])
        got = _texts(sampler(model, part, sampling, key=key))
        assert got == [t for i in split for t in _texts(whole)[4 * i : 4 * i + 4]]


def test_samples_and_keys_differ(sampler: Sampler, model):
    sampling = Sampling(8, 12, (STOP,))
    first = _texts(sampler(model, _prompts(), sampling, key=jax.random.key(3)))
    assert len(set(first[:8])) > 4
    assert first != _texts(sampler(model, _prompts(), sampling, key=jax.random.key(4)))


def test_groups_positions_and_columns(sampler: Sampler, model):
    rollout = sampler(model, _prompts(), Sampling(2, 5, (STOP,)), key=jax.random.key(0))
    assert np.asarray(rollout.group).tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    packed = compact(rollout, step=4)
    for i, row in enumerate(np.asarray(packed.positions)):
        used = row[row >= 0]
        assert used.tolist() == list(range(len(used))), "positions run on through the completion"
        prompt = PROMPTS[i // 2]
        assert np.asarray(packed.tokens)[i, : len(prompt)].tolist() == prompt
        assert not np.asarray(packed.mask)[i, : len(prompt)].any()
    types = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    types = {name: str(x.dtype) for name, x in types.items() if x is not None}
    assert types.pop("version", "int32") == "int32"
    assert types == {
        "tokens": "int32", "mask": "bool", "positions": "int32", "logprobs": "float32",
        "group": "int32", "truncated": "bool",
    }  # fmt: skip
