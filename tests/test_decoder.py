"""The in-process decoder: its draws, its ways through the layers. What it shares with every other
sampler is in `test_samplers.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, tiny_model

from eqrl._prompts import pad_prompts
from eqrl.samplers import Decoder, Sampling, draw
from eqrl.samplers._layers import IN_TURN, SCANNED
from eqrl.samplers.decoder import _run


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]


def _prompts(rows=PROMPTS, ids=None, width=8):
    return pad_prompts(rows, range(len(rows)) if ids is None else ids, width=width)


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


# --- the layers, in turn or scanned ---------------------------------------------------------------


def _program(sampling, fold):
    return jax.jit(lambda policy, prompts, key: _run(policy, prompts, key, sampling, fold))


@pytest.mark.parametrize(("tied", "temperature"), [(True, 1.0), (False, 0)])
def test_both_ways_through_the_layers_give_the_same_rollout(tied, temperature):
    model, sampling = tiny_model(tied=tied), Sampling(3, 12, (1, 2, 3), temperature)
    a, b = (
        _program(sampling, fold)(model, _prompts(), jax.random.key(6))
        for fold in (IN_TURN, SCANNED)
    )
    assert np.asarray(a.mask).sum() > 40
    for name in ("tokens", "mask", "positions", "group", "truncated"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    close(a.logprobs, b.logprobs)


def test_tpus_get_one_body_for_all_layers_and_others_a_copy_each():
    """By the products and loops of the program that each platform is given."""
    model, sampling = tiny_model(), Sampling(2, 4, (1,))
    layers, args = model.architecture.num_layers, (model, _prompts(), jax.random.key(0))

    def counts(platform, program):
        lowered = program.trace(*args).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.while")

    count = functools.partial(
        counts,
        program=jax.jit(lambda policy, prompts, key: Decoder()(policy, prompts, sampling, key=key)),
    )
    (products, loops), (tpu_products, tpu_loops) = count("cuda"), count("tpu")
    # All are a layer's, but for the unembedding.
    assert products - 1 == layers * (tpu_products - 1)
    assert (loops, tpu_loops) == (1, 3), "decoding; and the layers of a prefill and of a step"
    assert count("cpu")[0] == products
    # The choice is made when a program is lowered: none has both.
    assert tpu_products == counts("tpu", _program(sampling, SCANNED))[0]
