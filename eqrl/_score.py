"""What a policy, a reference and a critic say of a rollout's tokens."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array

from ._logprobs import Implementation, token_logprobs
from ._pack import pad_rows
from ._prompts import coarse_bucket
from ._types import Rollout, ScalarLike, Scores
from .models import ROWS, Transformer, ValueModel, by_rows, previous


def score(
    policy: Transformer,
    rollout: Rollout,
    *,
    critic: ValueModel | None = None,
    temperature: ScalarLike = 1.0,
    implementation: Implementation = None,
    buffer: int | None = None,
    shards: int = 1,
    remat: bool = False,
) -> Scores:
    """Log-probs and entropy of the masked tokens, and the critic's values before them.

    Only masked tokens go through the output head: they are gathered into one buffer first.

    Args:
        policy: the policy to ask.
        rollout: the tokens to score; any layout of columns.
        critic: predicts values if given.
        temperature: the sampling temperature.
        implementation: of `token_logprobs`.
        buffer: how many masked tokens the buffer holds; tokens beyond it would be lost, so it must
            be at least `rollout.mask.sum()`. Every position by default.
        shards: of the rows, over devices; see `token_logprobs`.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """
    hidden = policy(rollout.tokens, rollout.positions, remat=remat)
    # hidden[b, previous] predicts token [b, t].
    before = previous(rollout.positions)[:, :, None]
    logprobs, entropy = token_logprobs(
        jnp.take_along_axis(hidden, before, axis=1),
        policy.unembedding,
        rollout.tokens,
        temperature=temperature,
        mask=rollout.mask,
        buffer=buffer,
        shards=shards,
        implementation=implementation,
    )
    values = None if critic is None else critic(rollout.tokens, rollout.positions, remat=remat)
    return Scores(logprobs, entropy, values)


def buffer_size(mask, parts: int, shards: int = 1, given: int | None = None) -> int:
    """What holds the masked tokens of the fullest micro-batch: a bucket for each shard of it.

    Raises:
        ValueError: if the number that is given is too small, or there is none where it cannot be
            counted.
    """
    if isinstance(mask, Tracer):
        if given is None:
            raise ValueError(
                "buffer= must be given inside jit, where tokens cannot be counted: room for the "
                "masked tokens of the fullest micro-batch"
            )
        return given
    most = int(_fullest(mask, parts, shards))
    if given is None:
        return shards * coarse_bucket(most)
    if given % shards or given < shards * most:
        raise ValueError(
            f"buffer={given} must be at least {shards * most}, and a multiple of the {shards} row "
            "shards, or tokens would be lost"
        )
    return given


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fullest(mask, parts: int, shards: int):
    """Masked tokens in a shard of a micro-batch, at most; one number, for all processes to read."""
    counts = jnp.sum(mask, axis=1, dtype=jnp.int32).reshape(shards, -1, parts).sum(axis=1)
    return jnp.max(counts, initial=0)


def row_shards(x: Array) -> int:
    """Over how many devices an array's rows are spread; in a trace, as the mesh in use says."""
    if isinstance(x, Tracer):
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes.get(name, 1) for name in ROWS)
    if not isinstance(x.sharding, NamedSharding) or not x.sharding.spec:
        return 1
    axes = x.sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(x.sharding.mesh.shape[name] for name in names if name is not None)


def parts_of(rows: int, micro_batch: int | None, shards: int = 1) -> tuple[int, int]:
    """Number of micro-batches, and rows after padding them to equal size.

    A micro-batch has as many rows on each of `shards` devices: `micro_batch` is rounded up to that.
    """
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1, or None for all rows")
    size = rows if micro_batch is None else min(micro_batch, rows)
    size = -(-size // shards) * shards
    parts = -(-rows // size)
    return parts, parts * size


def split(tree, parts: int):
    """Every array `[rows, ...]` as `[parts, rows / parts, ...]`, to be scanned.

    Part p has the rows p, p + parts, ...: every device keeps the rows it has.
    """

    def one(x):
        return by_rows(jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), axis=1)

    return jax.tree.map(one, tree)


def join(tree):
    """The inverse of `split`."""
    return jax.tree.map(lambda x: by_rows(jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])), tree)


def annotate(
    rollout: Rollout,
    requires: frozenset[str],
    *,
    policy: Transformer | None = None,
    reference: Transformer | None = None,
    critic: ValueModel | None = None,
    temperature: ScalarLike = 1.0,
    implementation: Implementation = None,
    micro_batch: int | None = None,
    buffer: int | None = None,
) -> Rollout:
    """Fills the optional fields that `requires` names, and runs no forward pass beyond them.

    Args:
        rollout: the rollout to complete.
        requires: of `"old_logprobs"`, `"old_entropy"`, `"sum_pi_squared"`, `"ref_logprobs"`,
            `"values"`: `algorithm.requires`, plus `"old_logprobs"` when the rollout serves more
            than one update. Other names are left to whoever samples.
        policy: gives `old_logprobs`, `old_entropy` and `sum_pi_squared`.
        reference: gives `ref_logprobs`.
        critic: gives `values`.
        temperature: the sampling temperature.
        implementation: of `token_logprobs`.
        micro_batch: rows a forward pass; all at once by default.
        buffer: room for the masked tokens of the fullest micro-batch: on a mesh, row shards times
            those of the fullest shard. Counted by default, which needs the mask's values: inside
            `jit` it must be given, and tokens beyond it are lost.

    Raises:
        ValueError: if the model behind a required field is missing.
    """
    models = {"policy": policy, "reference": reference, "critic": critic}
    wanted = tuple(sorted(_GIVEN_BY.keys() & requires))
    for name in wanted:
        if models[_GIVEN_BY[name]] is None:
            raise ValueError(f"`{name}` is required; pass `{_GIVEN_BY[name]}=` to `annotate`")
    if not wanted:
        return rollout
    rows = rollout.tokens.shape[0]
    shards = row_shards(rollout.mask)
    parts, padded_rows = parts_of(rows, micro_batch, shards)
    padded = pad_rows(rollout, padded_rows)
    found = _annotate(
        {name: models[name] for name in {_GIVEN_BY[field] for field in wanted}},
        padded,
        wanted,
        temperature,
        implementation,
        parts,
        buffer_size(padded.mask, parts, shards, buffer),
        shards,
    )
    found = {name: x[:rows] for name, x in found.items()}
    return eqx.tree_at(
        lambda r: [getattr(r, name) for name in found],
        rollout,
        list(found.values()),
        is_leaf=lambda x: x is None,
    )


# Which model gives each of the fields.
_GIVEN_BY = {
    "old_logprobs": "policy",
    "old_entropy": "policy",
    "sum_pi_squared": "policy",
    "ref_logprobs": "reference",
    "values": "critic",
}

# What `annotate` can fill.
ANNOTATED = frozenset(_GIVEN_BY)


@eqx.filter_jit
def _annotate(models, rollout, wanted, temperature, implementation, parts, buffer, shards):
    def scored(model, part: Rollout, temperature) -> Scores:
        return score(
            model,
            part,
            temperature=temperature,
            implementation=implementation,
            buffer=buffer,
            shards=shards,
        )

    def one(part: Rollout):
        found = {}
        if "reference" in models:
            found["ref_logprobs"] = scored(models["reference"], part, temperature).logprobs
        if "critic" in models:
            values = models["critic"](part.tokens, part.positions)
            found["values"] = jnp.where(part.mask, values, 0)
        if "policy" in models:
            old = scored(models["policy"], part, temperature)
            found |= {"old_logprobs": old.logprobs, "old_entropy": old.entropy}
        if "sum_pi_squared" in wanted:
            # log sum pi^2 = log Z(T/2) - 2 log Z(T), and either log Z is a logit minus a log-prob.
            sharp = scored(models["policy"], part, 0.5 * temperature).logprobs
            squared = jnp.exp(2 * found["old_logprobs"] - sharp)
            found["sum_pi_squared"] = jnp.where(part.mask, squared, 0)
        return {name: found[name] for name in wanted}

    return join(lax.map(one, split(rollout, parts)))
