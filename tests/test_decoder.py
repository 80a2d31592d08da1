"""The sampler contract, on the in-process decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, tiny_model

from eqrl._pack import compact
from eqrl._prompts import pad_prompts
from eqrl._score import score
from eqrl.samplers import Decoder, draw
from eqrl.samplers._layers import IN_TURN, SCANNED
from eqrl.samplers.decoder import _run


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]


def _prompts(rows=PROMPTS, ids=None, width=8):
    return pad_prompts(rows, range(len(rows)) if ids is None else ids, width=width)


def _texts(rollout):
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return [tuple(row[keep]) for row, keep in zip(tokens, mask, strict=True)]


def test_logprobs_are_the_policys_own_over_more_than_fifty_tokens():
    model = tiny_model()
    rollout = Decoder(3, 60, (1,), temperature=0.7)(model, _prompts(), key=jax.random.key(0))
    lengths = np.asarray(rollout.mask).sum(axis=1)
    assert lengths.max() > 50
    scores = score(model, compact(rollout, step=8), temperature=0.7)
    mask = np.asarray(compact(rollout, step=8).mask)
    want = np.asarray(compact(rollout, step=8).logprobs)[mask]
    np.testing.assert_allclose(np.asarray(scores.logprobs)[mask], want, atol=1e-4)


def test_untied_head_and_greedy_follow_the_argmax():
    model = tiny_model(tied=False)
    rollout = Decoder(1, 5, (1,), temperature=0)(
        model, _prompts(PROMPTS[:2]), key=jax.random.key(0)
    )
    for prompt, completion in zip(PROMPTS[:2], _texts(rollout), strict=True):
        row = list(prompt)
        for token in completion:
            tokens = jnp.asarray([row])
            hidden = model(tokens, jnp.arange(len(row))[None])[0, -1]
            assert int(jnp.argmax(model.unembedding @ hidden)) == token
            row.append(int(token))


def test_stop_tokens_end_a_row_and_stay_in_the_mask():
    model, stops = tiny_model(), tuple(range(20, 37))
    rollout = Decoder(16, 10, stops)(model, _prompts(), key=jax.random.key(1))
    texts, truncated = _texts(rollout), np.asarray(rollout.truncated)
    assert any(len(text) == 1 for text in texts), "no row stopped at its first token"
    for text, cut in zip(texts, truncated, strict=True):
        assert all(token not in stops for token in text[:-1])
        assert cut == (text[-1] not in stops)
        assert not cut or len(text) == 10


def test_same_key_same_completions_for_any_split_of_the_batch():
    model, decoder, key = tiny_model(), Decoder(4, 12, (1,)), jax.random.key(2)
    whole = _texts(decoder(model, _prompts(ids=[5, 3, 9, 0]), key=key))
    for split in ([0, 2], [3, 1]):
        part = _prompts([PROMPTS[i] for i in split], ids=[[5, 3, 9, 0][i] for i in split])
        got = _texts(decoder(model, part, key=key))
        assert got == [t for i in split for t in whole[4 * i : 4 * i + 4]]
    wider = _texts(decoder(model, _prompts(ids=[5, 3, 9, 0], width=19), key=key))
    assert wider == whole


def test_samples_and_keys_differ():
    model, decoder = tiny_model(), Decoder(8, 12, (1,))
    first = _texts(decoder(model, _prompts(), key=jax.random.key(3)))
    assert len(set(first[:8])) > 4
    assert first != _texts(decoder(model, _prompts(), key=jax.random.key(4)))


def test_groups_positions_and_columns():
    rollout = Decoder(2, 5, (1,))(tiny_model(), _prompts(), key=jax.random.key(0))
    assert np.asarray(rollout.group).tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    packed = compact(rollout, step=4)
    for i, row in enumerate(np.asarray(packed.positions)):
        used = row[row >= 0]
        assert used.tolist() == list(range(len(used))), "positions run on through the completion"
        prompt = PROMPTS[i // 2]
        assert np.asarray(packed.tokens)[i, : len(prompt)].tolist() == prompt
        assert not np.asarray(packed.mask)[i, : len(prompt)].any()


def test_draw_follows_the_distribution_and_never_takes_the_impossible():
    vocab = 300
    logits = np.full(vocab, -np.inf, np.float32)
    logits[[0, 5, 127, 128, 299]] = np.log([0.1, 0.2, 0.3, 0.25, 0.15])
    uniform = jnp.linspace(0, 1, 20_000, endpoint=False)
    rows = jnp.broadcast_to(jnp.asarray(logits), (uniform.size, vocab))
    tokens, logprobs = jax.jit(draw)(rows, uniform)
    share = np.bincount(np.asarray(tokens), minlength=vocab) / uniform.size
    np.testing.assert_allclose(share, np.exp(logits), atol=2e-4)
    close(logprobs, logits[np.asarray(tokens)])
    edge, _ = draw(rows[:1], jnp.asarray([np.nextafter(np.float32(1), np.float32(0))]))
    assert int(edge[0]) == 299


@pytest.mark.parametrize("bad", [{"samples": 0}, {"max_tokens": 0}, {"temperature": -1.0}])
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Decoder(**{"samples": 1, "max_tokens": 1, "stop_ids": (1,), **bad})


# --- the layers, in turn or scanned ---------------------------------------------------------------


def _program(decoder, fold):
    return jax.jit(lambda policy, prompts, key: _run(policy, prompts, key, decoder, fold))


@pytest.mark.parametrize(("tied", "temperature"), [(True, 1.0), (False, 0)])
def test_both_ways_through_the_layers_give_the_same_rollout(tied, temperature):
    model, decoder = tiny_model(tied=tied), Decoder(3, 12, (1, 2, 3), temperature)
    a, b = (
        _program(decoder, fold)(model, _prompts(), jax.random.key(6)) for fold in (IN_TURN, SCANNED)
    )
    assert np.asarray(a.mask).sum() > 40
    for name in ("tokens", "mask", "positions", "group", "truncated"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    close(a.logprobs, b.logprobs)


def test_tpus_get_one_body_for_all_layers_and_others_a_copy_each():
    """By the products and loops of the program that each platform is given."""
    model, decoder = tiny_model(), Decoder(2, 4, (1,))
    layers, args = model.architecture.num_layers, (model, _prompts(), jax.random.key(0))

    def counts(platform, program):
        lowered = program.trace(*args).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.while")

    count = functools.partial(
        counts, program=jax.jit(lambda policy, prompts, key: decoder(policy, prompts, key=key))
    )
    (products, loops), (tpu_products, tpu_loops) = count("cuda"), count("tpu")
    # All are a layer's, but for the unembedding.
    assert products - 1 == layers * (tpu_products - 1)
    assert (loops, tpu_loops) == (1, 3), "decoding; and the layers of a prefill and of a step"
    assert count("cpu")[0] == products
    # The choice is made when a program is lowered: none has both.
    assert tpu_products == counts("tpu", _program(decoder, SCANNED))[0]
