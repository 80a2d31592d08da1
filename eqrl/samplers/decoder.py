"""The in-process sampler: one prefill a prompt, one compiled decode loop."""

import functools
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from .._prompts import Prompts
from .._types import Rollout, wide
from ..models import Transformer, attention, causal, constrain
from ..models._contract import contract
from ._layers import IN_TURN, SCANNED, Fold
from .base import Sampling
from .draw import draw


# Keys and values `[batch kv time head_dim]` of each layer, kept as the `Fold` in use wants them.
Cache: TypeAlias = PyTree[Float[Array, "..."]]


class Decoder(eqx.Module):
    """Samples with the policy's own weights, in this process.

    A prompt runs through the model once for all its completions, and its keys and values are kept
    once. The decode loop is one compiled program that ends when every row has stopped. The key of
    a token is `fold_in(key, prompt id, sample, index)`, so a completion depends on neither its
    neighbours nor the batch split.
    """

    def __call__(
        self, policy: Transformer, prompts: Prompts, sampling: Sampling, *, key: PRNGKeyArray
    ) -> Rollout:
        """See `Sampler`."""
        return _sample(policy, prompts, key, sampling)


class _Carry(NamedTuple):
    """What the decode loop carries; `batch` rows, `slot` completion tokens."""

    step: Int[Array, ""]
    hidden: Float[Array, "batch d"]
    done: Bool[Array, " batch"]
    tokens: Int[Array, "batch slot"]
    logprobs: Float[Array, "batch slot"]
    mask: Bool[Array, "batch slot"]
    cache: Cache


@eqx.filter_jit
def _sample(
    policy: Transformer, prompts: Prompts, key: PRNGKeyArray, sampling: Sampling
) -> Rollout:
    arrays, static = eqx.partition((policy, prompts, key), eqx.is_array)

    def run(fold: Fold, arrays):
        policy, prompts, key = eqx.combine(arrays, static)
        return _run(policy, prompts, key, sampling, fold)

    return lax.platform_dependent(
        arrays, tpu=functools.partial(run, SCANNED), default=functools.partial(run, IN_TURN)
    )


def _run(
    policy: Transformer, prompts: Prompts, key: PRNGKeyArray, sampling: Sampling, fold: Fold
) -> Rollout:
    layers = fold.layers(policy)
    hidden, prompt_cache = _prefill(policy, layers, prompts, fold)
    lengths = jnp.sum(prompts.positions >= 0, axis=1)
    row_keys = _row_keys(key, prompts.ids, sampling.samples)
    lengths, hidden = (jnp.repeat(x, sampling.samples, axis=0) for x in (lengths, hidden))
    prompt_visible = prompts.positions >= 0

    def more(carry: _Carry):
        return (carry.step < sampling.max_tokens) & ~jnp.all(carry.done)

    def step(carry: _Carry) -> _Carry:
        carry, token = _choose(policy, sampling, row_keys, carry)
        rotary = policy.rotary((lengths + carry.step)[:, None])
        earlier = jnp.arange(sampling.max_tokens) < carry.step

        def through(x, of_layer):
            layer, prompt, completion = of_layer
            q, k, v = layer.qkv(x, rotary)
            new = _head_major(k), _head_major(v)
            attended = _attend(q, prompt, completion, new, prompt_visible, earlier)
            return layer.finish(x, attended), new

        x, new = fold.run(through, policy.embed(token[:, None]), layers, prompt_cache, carry.cache)
        return carry._replace(
            step=carry.step + 1,
            hidden=policy.final(x)[:, 0],
            cache=_write(carry.cache, new, carry.step),
        )

    carry = lax.while_loop(more, step, _start(sampling, hidden, prompt_cache))
    return _rollout(prompts, sampling, lengths, carry)


def _prefill(policy: Transformer, layers, prompts: Prompts, fold: Fold):
    """Last-position hidden state of each prompt, and its keys and values a layer."""
    rotary = policy.rotary(prompts.positions)
    visible = causal(prompts.positions, prompts.positions)

    def through(x, of_layer):
        (layer,) = of_layer
        q, k, v = layer.qkv(x, rotary)
        return layer.finish(x, attention(q, k, v, visible)), (_head_major(k), _head_major(v))

    x, cache = fold.run(through, policy.embed(prompts.tokens), layers)
    last = jnp.argmax(prompts.positions, axis=1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return policy.final(x)[:, 0], cache


def _row_keys(key: PRNGKeyArray, ids: Int[Array, " prompt"], samples: int) -> Key[Array, " batch"]:
    """One key a row, from the prompt's id and the sample's index alone."""
    of_prompt = jax.vmap(jr.fold_in, (None, 0))(key, ids)
    of_row = jax.vmap(jax.vmap(jr.fold_in, (None, 0)), (0, None))(of_prompt, jnp.arange(samples))
    return of_row.reshape(-1)


def _start(sampling: Sampling, hidden: Float[Array, "batch d"], prompt_cache: Cache) -> _Carry:
    batch, slots = hidden.shape[0], sampling.max_tokens

    def empty(x):
        *layers, _, kv, _, width = x.shape
        return constrain(jnp.zeros((*layers, batch, kv, slots, width), x.dtype), "cache")

    return _Carry(
        step=jnp.zeros((), jnp.int32),
        hidden=hidden,
        done=jnp.zeros((batch,), bool),
        tokens=jnp.zeros((batch, slots), jnp.int32),
        logprobs=jnp.zeros((batch, slots), wide(hidden.dtype)),
        mask=jnp.zeros((batch, slots), bool),
        cache=jax.tree.map(empty, prompt_cache),
    )


def _choose(policy: Transformer, sampling: Sampling, row_keys: Key[Array, " batch"], carry: _Carry):
    """Draws the next token of every row and records it where the row is still alive."""
    logits = contract("bd,vd->bv", carry.hidden, policy.unembedding)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=1)
    else:
        of_token = jax.vmap(jr.fold_in, (0, None))(row_keys, carry.step)
        uniform = jax.vmap(lambda k: jr.uniform(k, (), logits.dtype))(of_token)
        token, logprob = draw(logits / sampling.temperature, uniform)
    alive = ~carry.done
    stop = jnp.isin(token, jnp.asarray(sampling.stop_ids, jnp.int32))
    return carry._replace(
        done=carry.done | stop,
        tokens=_record(carry.tokens, token, alive, carry.step),
        logprobs=_record(carry.logprobs, logprob, alive, carry.step),
        mask=_record(carry.mask, alive, alive, carry.step),
    ), token


def _record(buffer, value, alive, step):
    column = jnp.where(alive, value, jnp.zeros((), value.dtype))[:, None]
    return lax.dynamic_update_slice_in_dim(buffer, column, step, axis=1)


def _head_major(
    x: Float[Array, "batch time kv head_dim"],
) -> Float[Array, "batch kv time head_dim"]:
    return constrain(jnp.swapaxes(x, 1, 2), "cache")


def _write(cache: Cache, new: Cache, step: Int[Array, ""]) -> Cache:
    """Puts the step's keys or values into their slot."""
    return jax.tree.map(
        lambda old, x: lax.dynamic_update_slice_in_dim(old, x, step, axis=old.ndim - 2), cache, new
    )


def _attend(
    q: Float[Array, "batch 1 heads head_dim"],
    prompt: tuple[Array, Array],
    completion: tuple[Array, Array],
    new: tuple[Array, Array],
    prompt_visible: Bool[Array, "prompt time"],
    earlier: Bool[Array, " slot"],
) -> Float[Array, "batch 1 heads head_dim"]:
    """Attention of one token a row over its prompt's shared cache, its own one, and itself.

    Rows are grouped by prompt, so the prompt's keys are read once for all its samples. The token's
    own key is apart from the cache, so that the loop over layers only reads what it is given.
    """
    prompts, kv, time, width = prompt[0].shape
    batch = q.shape[0]
    grouped = q.reshape(prompts, batch // prompts, kv, -1, width)
    own = q.reshape(batch, kv, -1, width)
    over_prompt = contract("pskrd,pktd->pskrt", grouped, prompt[0])
    over_earlier = contract("bkrd,bktd->bkrt", own, completion[0])
    over_itself = contract("bkrd,bktd->bkrt", own, new[0])
    hidden = jnp.finfo(over_prompt.dtype).min
    over_prompt = jnp.where(prompt_visible[:, None, None, None, :], over_prompt, hidden)
    over_earlier = jnp.where(earlier[None, None, None, :], over_earlier, hidden)
    over_prompt = over_prompt.reshape(batch, kv, -1, time)
    scores = jnp.concatenate([over_prompt, over_earlier, over_itself], axis=-1) * width**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_prompt = weights[..., :time].reshape(prompts, batch // prompts, kv, -1, time)
    attended = contract("pskrt,pktd->pskrd", of_prompt, prompt[1]).reshape(own.shape)
    attended = attended + contract("bkrt,bktd->bkrd", weights[..., time:-1], completion[1])
    attended = attended + contract("bkrt,bktd->bkrd", weights[..., -1:], new[1])
    return attended.astype(q.dtype).reshape(q.shape)


def _rollout(prompts: Prompts, sampling: Sampling, lengths, carry: _Carry) -> Rollout:
    """Prompt columns, then completion columns; the holes between them have position -1."""
    repeat = lambda x: jnp.repeat(x, sampling.samples, axis=0)  # noqa: E731
    count, width = prompts.tokens.shape
    slots = jnp.arange(sampling.max_tokens, dtype=jnp.int32)
    positions = jnp.where(carry.mask, lengths[:, None] + slots[None, :], -1)
    before = jnp.zeros((count * sampling.samples, width))
    return Rollout(
        tokens=jnp.concatenate([repeat(prompts.tokens), carry.tokens], axis=1),
        mask=jnp.concatenate([before.astype(bool), carry.mask], axis=1),
        positions=jnp.concatenate([repeat(prompts.positions), positions], axis=1),
        logprobs=jnp.concatenate([before.astype(carry.logprobs.dtype), carry.logprobs], axis=1),
        group=repeat(jnp.arange(count, dtype=jnp.int32) * sampling.samples),
        truncated=~carry.done,
    )
