"""Checkpoints: bit-exact, whole or absent, refused for another state; and what a run resumes."""

import logging
import random
import resource
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqrl.checkpoint import Checkpoints, Resume, resolve_resume


pytest.importorskip("orbax.checkpoint")


def _state(optimizer=None):
    model = eqx.nn.MLP(3, 4, 8, 2, key=jax.random.key(0))
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(eqx.filter(model, eqx.is_array))
    return {
        "policy": model,
        "critic": None,
        "opt": opt_state,
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "half": jnp.asarray([0.1, jnp.nan, -0.0], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "flags": jnp.asarray([True, False]),
        "count": jnp.asarray(7, jnp.int32),
        "weak": jnp.asarray(1.5),
        "host": np.arange(5, dtype=np.uint64),
        "placed": jax.device_put(jnp.ones(2), jax.devices()[0]),
    }


def _arrays(**changes):
    return eqx.partition(_state() | changes, eqx.is_array)[0]


def _bits(leaf):
    typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    leaf = jax.random.key_data(leaf) if typed_key else leaf
    return np.asarray(leaf).tobytes()


def test_round_trip_is_bit_exact(tmp_path):
    arrays = _arrays()
    extra = {"data": {"epoch": 1, "order": [3, 1]}, "big": 2**63 + 1, "rate": 0.1, "none": None}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(4, arrays, extra)
        zeros = jax.tree.map(lambda x: x, _arrays())
        restored, restored_extra = checkpoints.restore(zeros)
    assert restored_extra == extra
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    for before, after in zip(jax.tree.leaves(arrays), jax.tree.leaves(restored), strict=True):
        assert type(after) is type(before)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert _bits(after) == _bits(before)
        if isinstance(before, jax.Array):
            assert getattr(after, "weak_type", None) == getattr(before, "weak_type", None)
            assert after.committed == before.committed
            assert after.sharding == before.sharding


def test_values_come_from_disk_and_not_from_the_target(tmp_path):
    target = {"a": jnp.zeros(3), "b": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(3.0), "b": jax.random.key(9)}, {})
        restored, _ = checkpoints.restore(target)
    np.testing.assert_array_equal(restored["a"], [0, 1, 2])
    assert _bits(restored["b"]) == _bits(jax.random.key(9))


def test_restore_into_shapes_with_sharding(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(3.0)}, {})
        shape = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)
        restored, _ = checkpoints.restore({"a": shape})
    assert restored["a"].sharding == sharding
    np.testing.assert_array_equal(restored["a"], [0, 1, 2])


def test_keeps_the_last_steps_and_replaces_an_existing_one(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"a": jnp.full(2, step)}, {"step": step})
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.save(3, {"a": jnp.full(2, 30)}, {"step": 30})
        restored, extra = checkpoints.restore({"a": jnp.full(2, 0)})
        assert (restored["a"][0], extra) == (30, {"step": 30})
        assert checkpoints.restore({"a": jnp.full(2, 0)}, 2)[1] == {"step": 2}
        checkpoints.drop_after(2)
        assert checkpoints.steps() == [2]
        assert checkpoints.save(3, {"a": jnp.full(2, 3)}, {})
        assert checkpoints.steps() == [2, 3]


def test_what_a_kill_left_behind_is_swept_away(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(8, {"a": jnp.ones(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["8"]


def test_another_state_is_refused_by_its_first_leaf(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _arrays(), {})
        other_model = _arrays(policy=eqx.nn.MLP(3, 4, 16, 2, key=jax.random.key(0)))
        with pytest.raises(ValueError, match=r"\['policy'\].layers\[0\].weight float32\[8, 3\]"):
            checkpoints.restore(other_model)
        other_optimizer = _state(optax.sgd(0.1, momentum=0.9))
        with pytest.raises(ValueError, match=r"\['opt'\]\[0\].count .* \['opt'\]\[0\].trace"):
            checkpoints.restore(eqx.filter(other_optimizer, eqx.is_array))
        with pytest.raises(
            ValueError, match=r"\['weak'\] float32\[\] where this run has nothing more"
        ):
            fewer = {key: value for key, value in _arrays().items() if key != "weak"}
            checkpoints.restore(fewer)
        with pytest.raises(ValueError, match=r"\['half'\] bfloat16\[3\] .* float32\[3\]"):
            checkpoints.restore(_arrays(half=jnp.zeros(3)))


def test_what_cannot_come_back_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"extra\['a'\]\[1\] is a tuple"):
        checkpoints.save(1, {}, {"a": [1, (2,)]})
    with pytest.raises(ValueError, match=r"extra\[.a.\] is a dict"):
        checkpoints.save(1, {}, {"a": {1: 2}})
    with pytest.raises(ValueError, match=r"\['a'\] is a float, not an array"):
        checkpoints.save(1, {"a": 1.0}, {})
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.restore({})
    with pytest.raises(ValueError, match="keep=1"):
        Checkpoints(tmp_path, keep=0)


def test_a_full_disk_costs_one_warning_and_no_older_checkpoint(tmp_path, caplog):
    noise = {"a": np.random.default_rng(0).integers(0, 2**31, 2**16)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, noise, {"step": 1})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))  # no file may grow past 16 KiB
        try:
            assert not checkpoints.save(2, noise, {"step": 2})
            assert not checkpoints.save(3, noise, {"step": 3})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.steps() == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        assert checkpoints.save(4, noise, {"step": 4})
        restored, extra = checkpoints.restore(noise)
    assert extra == {"step": 4}
    np.testing.assert_array_equal(restored["a"], noise["a"])
    warnings = [r.getMessage() for r in caplog.records if r.name == "eqrl"]
    assert len(warnings) == 1 and "step 2 was not saved" in warnings[0]


def test_orbax_is_silent_and_leaves_the_root_logger_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as without pytest's own
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, {})
        checkpoints.restore({"a": jnp.ones(2)})
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == []


_SAVER = """
import sys, numpy as np
from eqrl.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=3)
step = (checkpoints.latest() or 0) + 1
while True:
    noise = np.random.default_rng(step).integers(0, 2**31, 2**18)
    assert checkpoints.save(step, {"a": noise, "b": noise + 1}, {"step": step})
    print(step, flush=True)
    step += 1
"""


def test_kill_in_mid_save_never_harms_a_complete_checkpoint(tmp_path, root):
    rng = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5))
        child.kill()
        acknowledged = [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        checkpoints = Checkpoints(tmp_path, keep=3)
        assert max(checkpoints.steps()) >= max(acknowledged, default=1)
        blank = np.zeros(2**18, np.int64)
        for step in checkpoints.steps():
            arrays, extra = checkpoints.restore({"a": blank, "b": blank}, step)
            noise = np.random.default_rng(step).integers(0, 2**31, 2**18)
            np.testing.assert_array_equal(arrays["a"], noise)
            np.testing.assert_array_equal(arrays["b"], noise + 1)
            assert extra == {"step": step}


def _run_with_checkpoints(folder, *steps):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in steps:
            checkpoints.save(step, {"a": jnp.ones(1)}, {})
    return folder


def test_resume_modes(tmp_path):
    run = _run_with_checkpoints(tmp_path / "run", 5, 10)
    latest = Resume(run / "checkpoints", 10)
    assert resolve_resume("auto", run) == latest
    assert resolve_resume("auto", tmp_path / "new") is None
    assert resolve_resume("never", tmp_path / "new") is None
    assert resolve_resume(run, tmp_path / "new") == latest
    assert resolve_resume(str(run / "checkpoints"), run) == latest
    assert resolve_resume(run / "checkpoints" / "5", run) == Resume(run / "checkpoints", 5)


def test_resume_refusals(tmp_path):
    run = _run_with_checkpoints(tmp_path / "run", 5)
    with pytest.raises(ValueError, match="already holds a run; choose another --run-dir"):
        resolve_resume("never", run)
    with pytest.raises(ValueError, match="does not exist"):
        resolve_resume(tmp_path / "nowhere", run)
    (tmp_path / "bare" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resolve_resume(tmp_path / "bare", tmp_path / "new")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="another run than the one"):
        resolve_resume(run, other)
    with pytest.raises(ValueError, match="already holds a run"):
        resolve_resume("never", other)
    assert resolve_resume("auto", other) is None
