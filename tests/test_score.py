"""Scores do not depend on columns, buffers, micro-batches, or anything at masked positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, sampled_rollout, tiny_model

import eqrl
from eqrl import models


def _loop(model, rollout):
    """Log-prob and entropy of each masked token by one unpadded forward pass a row."""
    logprobs, entropy = np.zeros(rollout.mask.shape), np.zeros(rollout.mask.shape)
    for b in range(rollout.mask.shape[0]):
        columns = np.flatnonzero(np.asarray(rollout.positions)[b] >= 0)
        tokens = np.asarray(rollout.tokens)[b, columns]
        hidden = model(jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None])[0]
        logits = np.asarray(hidden, np.float64) @ np.asarray(model.unembedding, np.float64).T
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for i, column in enumerate(columns):
            if rollout.mask[b, column]:
                logprobs[b, column] = log_p[i - 1, tokens[i]]
                entropy[b, column] = -(np.exp(log_p[i - 1]) * log_p[i - 1]).sum()
    return logprobs, entropy


def test_scores_equal_one_unpadded_pass_a_row():
    model, rollout = tiny_model(), sampled_rollout(3)
    count = int(rollout.mask.sum())
    for buffer in (None, count, count + 3):
        scores = eqrl.score(model, rollout, buffer=buffer)
        want = _loop(model, rollout)
        close(scores.logprobs, want[0].astype(np.float32))
        close(scores.entropy, want[1].astype(np.float32))


def test_compacting_moves_columns_and_changes_no_score():
    model, rollout = tiny_model(), sampled_rollout(4, time=14)
    packed = eqrl.compact(rollout, step=4)
    positions = np.asarray(packed.positions)
    for row in positions:
        used = row[row >= 0]
        assert (row[: len(used)] == used).all(), "padding is not at the end"
    a, b = eqrl.score(model, rollout), eqrl.score(model, packed)
    close(np.sum(a.logprobs, axis=1), np.sum(b.logprobs, axis=1))
    close(np.asarray(a.entropy)[np.asarray(rollout.mask)], np.asarray(b.entropy)[packed.mask])


def test_garbage_on_padding_reaches_nothing():
    model, rollout = tiny_model(), sampled_rollout(5)
    padding = rollout.positions < 0
    noisy = dataclasses.replace(
        rollout,
        tokens=jnp.where(padding, 36, rollout.tokens),
        logprobs=jnp.where(rollout.mask, rollout.logprobs, jnp.nan),
    )
    close(eqrl.score(model, rollout).logprobs, eqrl.score(model, noisy).logprobs)


def test_annotate_runs_what_is_required_and_nothing_else():
    policy, rollout = tiny_model(), sampled_rollout(6)
    assert eqrl.annotate(rollout, frozenset()) is rollout
    found = eqrl.annotate(
        rollout,
        frozenset({"old_logprobs", "values"}),
        policy=policy,
        critic=models.ValueModel.init(policy),
        micro_batch=4,
    )
    close(found.old_logprobs, eqrl.score(policy, rollout).logprobs)
    assert found.ref_logprobs is None and found.need("values").shape == rollout.mask.shape
    with pytest.raises(ValueError, match="`reference=`"):
        eqrl.annotate(rollout, frozenset({"ref_logprobs"}))


def test_annotate_gives_entropy_and_squared_probabilities_of_the_sampling_policy():
    policy, rollout, temperature = tiny_model(), sampled_rollout(6), 0.7
    found = eqrl.annotate(
        rollout,
        frozenset({"old_entropy", "sum_pi_squared"}),
        policy=policy,
        temperature=temperature,
        micro_batch=2,
    )
    assert found.old_logprobs is None
    close(found.old_entropy, eqrl.score(policy, rollout, temperature=temperature).entropy)
    hidden = np.asarray(policy(rollout.tokens, rollout.positions), np.float64)
    before = np.asarray(models.previous(rollout.positions))
    for b, t in np.argwhere(np.asarray(rollout.mask)):
        logits = np.asarray(policy.unembedding, np.float64) @ hidden[b, before[b, t]] / temperature
        pi = np.exp(logits - logits.max())
        np.testing.assert_allclose(
            found.need("sum_pi_squared")[b, t], np.sum((pi / pi.sum()) ** 2), rtol=2e-5
        )
    assert not np.any(np.asarray(found.sum_pi_squared)[~np.asarray(rollout.mask)])


def test_a_missing_field_is_named_with_its_remedy():
    with pytest.raises(ValueError, match="ref_logprobs.*annotate"):
        sampled_rollout(0).need("ref_logprobs")
