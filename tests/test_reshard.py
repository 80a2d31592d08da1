"""A model from one layout to another, bit for bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from eqrl import models, sharding


def _bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


def _odd(dtype) -> models.Transformer:
    """Values that only a copy keeps: NaN, minus zero, and the smallest."""
    model = tiny_model(vocab=40, tied=False, dtype=dtype)
    odd = jnp.asarray([jnp.nan, -0.0, jnp.finfo(dtype).tiny, -jnp.inf], dtype)
    return eqx.tree_at(lambda m: m.norm, model, jnp.tile(odd, 4))


def _assert_laid(model, mesh, facts) -> None:
    """Every array lies as the table says, and no device has more than its part."""
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    wanted = jax.tree.leaves(sharding.shardings(model, mesh, facts))
    assert len(arrays) == len(wanted) > 10
    for x, where in zip(arrays, wanted, strict=True):
        assert x.sharding == where
        assert {s.data.shape for s in x.addressable_shards} == {where.shard_shape(x.shape)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_and_back_changes_no_bit(dtype):
    model = _odd(dtype)
    facts = model.architecture
    train, sample = (sharding.make_mesh(f"{a}=4,tensor=2") for a in ("fsdp", "data"))
    placed = sharding.place(model, train, facts)
    there = sharding.reshard(placed, sample, facts)
    back = sharding.reshard(there, train, facts)
    _assert_laid(there, sample, facts)
    _assert_laid(back, train, facts)
    assert jax.tree.structure(there) == jax.tree.structure(model) == jax.tree.structure(back)
    for one in (there, back):
        for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(_bits(x), _bits(y))
    # The first one is not consumed: the update still needs it.
    assert not any(x.is_deleted() for x in jax.tree.leaves(placed))


def test_sampling_has_no_weight_cut_along_fsdp():
    """A device holds a half for `tensor` of what is cut at all, before it was an eighth."""
    model = tiny_model(vocab=40)
    facts = model.architecture
    train, sample = (sharding.make_mesh(f"{a}=4,tensor=2") for a in ("fsdp", "data"))
    placed = sharding.place(model, train, facts)
    moved = sharding.reshard(placed, sample, facts)
    held = lambda m: m.layers.up.weight.addressable_shards[0].data.nbytes  # noqa: E731
    assert held(moved) == 4 * held(placed) == model.layers.up.weight.nbytes // 2


def test_what_is_no_array_stays_and_other_axes_too():
    model = tiny_model(vocab=40)
    facts = model.architecture
    tree = (model, "name", 3, None)
    mesh = sharding.make_mesh("fsdp=8")
    placed = (sharding.place(model, mesh, facts), *tree[1:])
    moved = sharding.reshard(placed, sharding.make_mesh("data=2,fsdp=2,tensor=2"), facts)
    assert moved[1:] == tree[1:]
    assert moved[0].architecture is facts and moved[0].layers.head_dim == model.layers.head_dim
    np.testing.assert_array_equal(moved[0].layers.up.weight, model.layers.up.weight)


@pytest.mark.parametrize("count", [1, 4])
def test_other_devices_are_refused(count):
    model = tiny_model(vocab=40)
    facts = model.architecture
    placed = sharding.place(model, sharding.make_mesh("fsdp=-1", jax.devices()[:count]), facts)
    with pytest.raises(ValueError, match="mesh must have the devices that the tree lies on; pass"):
        sharding.reshard(placed, sharding.make_mesh("data=8"), facts)


def test_one_program_a_layout():
    """A rollout of every step must not compile anew."""
    mesh = sharding.make_mesh("data=8")
    where = sharding.shardings(tiny_model(vocab=40), mesh, tiny_model(vocab=40).architecture)
    assert sharding.resharding(where.norm) is sharding.resharding(
        jax.sharding.NamedSharding(sharding.make_mesh("data=8"), where.norm.spec)
    )
