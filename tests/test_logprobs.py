"""Every implementation of the log-probs against the definition, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

from eqrl._logprobs import chunked, reference, token_logprobs


def _inputs(tokens, width, vocab, dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(3), 3)
    hidden = scale * jax.random.normal(keys[0], (tokens, width), jnp.float32)
    head = jax.random.normal(keys[1], (vocab, width), jnp.float32)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    return hidden.astype(dtype), head.astype(dtype), targets


def _numpy(hidden, head, targets, temperature):
    """float64, one token at a time."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logprobs, entropies = [], []
    for h, y in zip(hidden, np.asarray(targets), strict=True):
        z = head @ h / temperature
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        p = np.exp(log_p)
        logprobs.append(log_p[y])
        entropies.append(-(p[p > 0] * log_p[p > 0]).sum())
    return np.array(logprobs), np.array(entropies)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("vocab", "size"), [(40, 64), (40, 40), (37, 16), (33, 32), (64, 16)])
def test_chunked_values_are_the_definition(vocab, size, temperature):
    hidden, head, targets = _inputs(11, 6, vocab)
    got = chunked(hidden, head, targets, temperature, size=size)
    want = _numpy(hidden, head, targets, temperature)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize(("vocab", "size"), [(40, 40), (37, 16), (33, 32), (5, 4)])
def test_chunked_gradients_through_both_outputs(x64, vocab, size):
    hidden, head, targets = _inputs(7, 6, vocab, jnp.float64)
    weights = jax.random.normal(jax.random.key(5), (2, 7), jnp.float64)

    def loss(function, hidden, head):
        logprobs, entropy = function(hidden, head, targets, 0.8)
        return jnp.sum(weights[0] * logprobs) + jnp.sum(weights[1] * entropy)

    def sliced(*arguments):
        return chunked(*arguments, size=size)

    got = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(sliced, hidden, head)
    want = jax.grad(loss, (1, 2))(reference, hidden, head)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_extreme_logits_stay_finite():
    hidden, head, targets = _inputs(5, 6, 37, scale=3e3)
    got = chunked(hidden, head, targets, 1.0, size=16)
    want = _numpy(hidden, head, targets, 1.0)
    np.testing.assert_allclose(np.asarray(got[0]), want[0], rtol=1e-5, atol=1e-2)
    assert np.isfinite(np.asarray(got[1])).all()


def test_half_width_inputs_give_float32_results():
    hidden, head, targets = _inputs(9, 6, 37, jnp.bfloat16)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    want = _numpy(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, 1.0)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    close(logprobs, want[0])
    close(entropy, want[1])


def test_shapes_follow_targets_and_a_function_is_used_as_given():
    hidden, head, targets = _inputs(12, 6, 37)
    calls = []

    def own(hidden, head, targets, temperature):
        calls.append(hidden.shape)
        return reference(hidden, head, targets, temperature)

    shaped = hidden.reshape(3, 4, 6), head, targets.reshape(3, 4)
    got = token_logprobs(*shaped, implementation=own)
    assert calls == [(12, 6)] and got[0].shape == (3, 4)
    close(got[0], token_logprobs(*shaped, implementation="reference")[0])


def test_the_gradient_program_holds_no_token_by_vocabulary_array():
    tokens, width, vocab = 64, 8, 40_000

    def loss(hidden, head):
        logprobs, entropy = chunked(hidden, head, jnp.zeros(tokens, jnp.int32), 1.0, size=1000)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, width), (vocab, width))]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    stored = tokens * vocab * 4
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < stored / 4


def test_an_unknown_name_is_refused():
    with pytest.raises((ValueError, TypeError), match="implementation"):
        token_logprobs(*_inputs(3, 4, 5), implementation="fused")  # pyright: ignore
