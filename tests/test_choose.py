"""Which mesh trains and which one samples: by formulas that are worked out by hand here."""

import importlib.util
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import layout
import optax
import pytest
from config import parse

import eqrl
from eqrl import algorithms, models, samplers, sharding


# Parameters that are cut: two tables of 64 x 32, and a layer's 2 * 32 * 32 (queries and outputs),
# 2 * 32 * 16 (keys and values) and 3 * 32 * 48. Norms are whole everywhere: 2 a layer and one.
CUT = 2 * 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
WHOLE = 5 * 32
# Adam's counter, and the updates applied and skipped.
COUNTERS = 3 * 4


def _shapes(dtype, **changes):
    """A model and its training state with Adam, as shapes."""
    facts = {
        "family": "llama", "vocab_size": 64, "width": 32, "num_layers": 2, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 4, "ff_width": 48, "tied": False,
    }  # fmt: skip
    policy = models.abstract(models.Architecture(**(facts | changes)), dtype)
    state, _ = layout.state_shapes(policy, algorithms.reinforce(), optax.adam(1e-3))
    return policy, state


def _choices(*, dtype=jnp.bfloat16, update_tokens=1000, micro_batches=3, changes=None, **options):
    policy, state = _shapes(dtype, **(changes or {}))
    return sharding.mesh_choices(
        policy, state, update_tokens=update_tokens, micro_batches=micro_batches, **options
    )


def _axes(choices):
    return [choice.axes for choice in choices]


def _sizes(choice):
    return tuple(choice.mesh.devices.shape)


# --- the mesh of training -------------------------------------------------------------------------


def test_bytes_held_and_sent_are_those_of_the_formulas():
    found = {choice.axes: choice for choice in _choices()}
    assert CUT + WHOLE == 19_616
    both = found["data=2,fsdp=2,tensor=2"]
    # Weights and two moments in bfloat16, and the gradient in float32.
    assert both.state_bytes == (CUT // 4 + WHOLE) * (3 * 2 + 4) + COUNTERS
    # Three micro-batches of three gathers in bfloat16 and a float32 sum; half of each half is a
    # neighbour's.
    gathered = (3 * (3 * 2 + 4) + 2) * (19_616 // 2) // 2
    summed = 2 * 3 * 4 * (19_616 // 4) // 2
    crossed = 4 * 2 * 2 * (1000 * 32 * 2 // 4) // 2
    assert both.sent_bytes == gathered + summed + crossed == 156_928 + 58_848 + 128_000
    assert found["data=8"].sent_bytes == 2 * 3 * 4 * 19_616 * 7 // 8
    assert found["data=8"].state_bytes == 19_616 * 10 + COUNTERS
    assert found["fsdp=8"].sent_bytes == 32 * 19_616 * 7 // 8
    assert found["fsdp=8"].state_bytes == (CUT // 8 + WHOLE) * 10 + COUNTERS
    words = str(both)
    assert words.startswith("data=2,fsdp=2,tensor=2: 0.00 GiB of state and 0.00 GiB sent a step")


def test_without_a_capacity_all_fit_and_the_least_sent_comes_first():
    choices = _choices()
    assert len(choices) == 4 + 3 + 2, "tensor is 1, 2 or 4: there are four heads of keys"
    assert all(choice.fits and choice.capacity is None for choice in choices)
    assert all(choice.mesh.size == 8 for choice in choices)
    assert [choice.mesh.shape["tensor"] for choice in choices] == [1] * 4 + [2] * 3 + [4] * 2
    for tensor in (1, 2, 4):
        sent = [c.sent_bytes for c in choices if c.mesh.shape["tensor"] == tensor]
        assert sent == sorted(sent)
    assert choices[0].axes == "data=8"


@pytest.mark.parametrize(("tokens", "best"), [(1, "data=8"), (10**7, "data=8")])
def test_tensor_is_not_chosen_for_what_it_sends(tokens, best):
    """Even where few tokens make its sums the smallest of all."""
    choices = _choices(update_tokens=tokens)
    assert choices[0].axes == best
    least = min(choices, key=lambda choice: choice.sent_bytes)
    assert (least.mesh.shape["tensor"] > 1) == (tokens == 1)


def test_what_does_not_fit_comes_last_and_is_cut_further():
    whole = (CUT + WHOLE) * 10 + COUNTERS
    halves = (CUT // 2 + WHOLE) * 10 + COUNTERS
    room = int(halves / 0.6) + 1
    choices = _choices(capacity=room)
    assert choices[0].axes == "data=4,fsdp=2" and choices[0].state_bytes == halves
    assert [choice.fits for choice in choices] == [True] * 8 + [False]
    assert choices[-1].axes == "data=8" and choices[-1].state_bytes == whole
    assert "of 0.0 and" in str(choices[0])
    # A byte less, and halves do not fit either.
    assert _choices(capacity=int(halves / 0.6) - 1)[0].axes == "data=2,fsdp=4"


def test_where_nothing_fits_what_holds_least_comes_first():
    choices = _choices(capacity=1)
    assert not any(choice.fits for choice in choices)
    held = [choice.state_bytes for choice in choices]
    assert held == sorted(held) and held[0] == (CUT // 8 + WHOLE) * 10 + COUNTERS
    assert choices[0].axes == "fsdp=8"


def test_rows_are_not_cut_finer_than_there_are():
    """Tensor parallelism is for then: four rows on eight devices."""
    choices = _choices(row_units=(4, 2))
    assert {sharding.row_shards(choice.mesh) for choice in choices} == {4, 2}
    assert choices[0].mesh.shape["tensor"] == 2
    assert set(_axes(choices)) == {
        "data=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2",
        "data=2,tensor=4", "fsdp=2,tensor=4",
    }  # fmt: skip


@pytest.mark.parametrize(("capacity", "fits"), [(None, True), (10**9, True), (1, False)])
def test_with_more_devices_than_rows_somebody_computes_on_padding(capacity, fits):
    (only,) = _choices(row_units=(1,), capacity=capacity)
    assert (only.axes, only.fits, only.capacity) == ("fsdp=8", fits, capacity)
    assert only.state_bytes == (CUT // 8 + WHOLE) * 10 + COUNTERS
    assert only.sent_bytes == 32 * 19_616 * 7 // 8


def test_one_device_is_a_mesh_too():
    (only,) = _choices(devices=jax.devices()[:1])
    assert _sizes(only) == (1, 1, 1) and only.sent_bytes == 0 and only.fits


@pytest.mark.parametrize(
    ("changes", "largest"),
    [({"num_kv_heads": 8}, 8), ({"num_kv_heads": 8, "ff_width": 52}, 4), ({"num_kv_heads": 1}, 1)],
)
def test_tensor_divides_heads_and_the_inner_width(changes, largest):
    tensors = {choice.mesh.shape["tensor"] for choice in _choices(changes=changes)}
    assert max(tensors) == largest


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
def test_tensor_stays_within_a_host():
    """Two hosts of four chips."""
    devices = sharding.plan.topology("v4-16").devices
    choices = _choices(changes={"num_kv_heads": 8}, devices=devices)
    assert {choice.mesh.shape["tensor"] for choice in choices} == {1, 2, 4}


# --- the mesh of sampling -------------------------------------------------------------------------


def _sampling(axes, capacity):
    policy, state = _shapes(jnp.float32)
    mesh = sharding.make_mesh(axes)
    found = layout._sampling_mesh(mesh, policy, state, capacity)
    return tuple(found.devices.shape), found == mesh


# Beside Adam's state of float32 on `fsdp=8`, with the factor 1 / 0.75 of `layout.SHARE`.
HELD = 3 * 4 * (CUT // 8 + WHOLE) + COUNTERS


@pytest.mark.parametrize(
    ("room", "sizes"),
    [
        (None, (8, 1, 1)),
        (HELD + 4 * (CUT + WHOLE) + 1, (8, 1, 1)),
        (HELD + 4 * (CUT + WHOLE) - 1, (4, 1, 2)),
        (HELD + 4 * (CUT // 2 + WHOLE) + 1, (4, 1, 2)),
        (HELD + 4 * (CUT // 2 + WHOLE) - 1, (2, 1, 4)),
        (HELD + 4 * (CUT // 4 + WHOLE) + 1, (2, 1, 4)),
        (HELD + 4 * (CUT // 4 + WHOLE) - 1, (1, 8, 1)),
        (1, (1, 8, 1)),
    ],
)
def test_sampling_cuts_as_little_as_has_room(room, sizes):
    capacity = None if room is None else round(room / layout.SHARE)
    assert _sampling("fsdp=8", capacity) == (sizes, sizes == (1, 8, 1))


def test_sampling_keeps_the_tensor_of_training_and_a_mesh_without_fsdp():
    assert _sampling("fsdp=4,tensor=2", None) == ((4, 1, 2), False)
    assert _sampling("data=2,fsdp=2,tensor=2", None) == ((4, 1, 2), False)
    assert _sampling("data=4,tensor=2", 1) == ((4, 1, 2), True)


# --- `--mesh` -------------------------------------------------------------------------------------

WORDS = ("--rollout.prompts", "8", "--rollout.samples", "4", "--rollout.max-tokens", "8")


def _meshes(*words, capacity=None) -> Any:
    policy, state = _shapes(jnp.float32)
    return layout.choose_meshes(parse([*WORDS, *words]), policy, state, jax.devices(), capacity)


def test_auto_says_what_it_chose_and_why():
    found = _meshes("--mesh", "auto")
    assert tuple(found.train.devices.shape) == (8, 1, 1) and found.sample == found.train
    assert found.why.startswith("mesh auto: data=8: 0.00 GiB of state and 0.00 GiB sent a step")
    assert "; the least sent of what fits, the next is " in found.why
    assert "\n" not in found.why
    least = (CUT // 8 + WHOLE) * 16 + COUNTERS
    found = _meshes("--mesh", "auto", capacity=int(least / 0.6) + 1)
    assert tuple(found.train.devices.shape) == (1, 8, 1), "only this one has room"
    found = _meshes("--mesh", "auto", capacity=1)
    assert tuple(found.train.devices.shape) == (1, 8, 1) and found.sample == found.train
    assert found.why.endswith("; nothing fits, and this holds the least")


def test_auto_asks_for_tensor_where_rows_are_few():
    words = ("--rollout.prompts", "2", "--rollout.samples", "2", "--optim.micro-batch", "4")
    assert _meshes("--mesh", "auto", *words).train.shape["tensor"] == 2


def test_two_meshes_by_name_and_one_of_which_the_other_follows():
    both = _meshes("--mesh", "fsdp=-1/tensor=2,data=-1")
    assert [tuple(m.devices.shape) for m in both[:2]] == [(1, 8, 1), (4, 1, 2)] and not both.why
    # What was asked for is not judged.
    assert _meshes("--mesh", "fsdp=8/data=8", capacity=1).sample.shape["data"] == 8
    one = _meshes("--mesh", "fsdp=4,tensor=2")
    assert [tuple(m.devices.shape) for m in one[:2]] == [(1, 4, 2), (4, 1, 2)]
    auto = _meshes("--mesh", "auto/tensor=4,fsdp=2")
    assert tuple(auto.sample.devices.shape) == (1, 2, 4) and "mesh auto" in auto.why


@pytest.mark.parametrize("axes", ["fsdp=8/data=3", "fsdp=3", "fsdp=8/rows=8"])
def test_meshes_that_cannot_be_are_refused(axes):
    with pytest.raises(ValueError, match="mesh '(data=3|fsdp=3|rows=8)'"):
        _meshes("--mesh", axes)


def test_nothing_is_moved_for_one_device_or_one_mesh():
    mesh = sharding.make_mesh("data=8")
    policy = types.SimpleNamespace()
    for meshes in (layout.Meshes(), layout.Meshes(mesh, mesh)):
        assert layout.to_sample(policy, meshes, samplers.Decoder()) is policy  # pyright: ignore
        assert layout.from_sampling(policy, meshes) is policy


def test_shapes_of_a_state_are_those_of_the_state():
    policy = models.Transformer.init(_shapes(jnp.float32)[0].architecture, key=_key())
    critic = models.ValueModel.init(policy)
    real = eqrl.init(policy, algorithms.ppo(), optax.adam(1e-3), critic=critic)
    found, reference = layout.state_shapes(policy, algorithms.ppo(), optax.adam(1e-3))
    assert reference is policy and eqx.tree_equal(eqx.filter_eval_shape(lambda: real), found)


def _key():
    return jax.random.key(0)
