"""The state of a run on disk, with Orbax."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .resume import steps_in


logger = logging.getLogger("eqrl")

_FORMAT = 1


class Checkpoints:
    """Checkpoints of one run: `folder/<step>/`.

    ```python
    arrays, static = eqx.partition(state, eqx.is_array)
    checkpoints.save(step, arrays, {"data": position})
    arrays, extra = checkpoints.restore(arrays)
    state = eqx.combine(arrays, static)
    ```

    With several processes, all of them make every call, in the same order, and see the same
    folder; each writes and reads its own parts of the arrays.

    Args:
        folder: where the steps lie; created by the first save.
        keep: how many of the last steps stay on disk.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint has to stay, pass keep=1")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = None
        self._warned = False
        self._failures = 0

    def save(self, step: int, arrays: PyTree, extra: Mapping[str, Any]) -> bool:
        """Writes one step; when this returns True it is complete on disk.

        A disk or a library that fails costs this checkpoint only: one warning, False, and older
        checkpoints stay. A step that exists already is replaced. If one of several processes
        fails, all return False, after waiting five minutes for it.

        Args:
            step: number of the step; the data position and counters in `extra` belong to it.
            arrays: pytree whose leaves are jax or NumPy arrays, typed PRNG keys included.
            extra: dict of str, int, float, bool, None, lists and dicts with text keys.

        Returns:
            Whether the checkpoint is on disk.

        Raises:
            ValueError: if a leaf is no array, or `extra` would not come back as it is.
        """
        _check_json(dict(extra), "extra")
        leaves = _described(arrays)
        facts = {"format": _FORMAT, "leaves": [d for d, _ in leaves], "extra": dict(extra)}
        stored = {_name(i): _storable(leaf) for i, (_, leaf) in enumerate(leaves) if leaf.size}
        # A failed write surfaces as OSError, ValueError or XlaRuntimeError, by the layer that
        # met it. None of them may end a run whose state in memory is sound.
        try:
            with _quiet():
                self._write(step, stored, facts)
            failure = None
        except Exception as error:
            failure = error
        if all(_from_all(failure is None)):
            return True
        self._give_up(step, failure or OSError("another process could not write its part"))
        return False

    def restore(self, target: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step into the structure, dtypes and shardings of `target`.

        Args:
            target: pytree like the saved one; values are ignored, `jax.ShapeDtypeStruct` with a
                sharding will do.
            step: which step; `None` for the latest.

        Returns:
            The arrays, bit for bit, and `extra`.

        Raises:
            ValueError: if there is no such checkpoint, or it belongs to another state; names the
                first leaf that differs.
        """
        step = self.latest() if step is None else step
        if step is None or not all(_from_all(step in self.steps())):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            where = " in all processes" if jax.process_count() > 1 else ""
            raise ValueError(f"no {wanted} in {self.folder}{where}; it has steps {self.steps()}")
        leaves = _described(target)
        with _quiet(), _reader(self.folder) as read:
            facts = read(step, facts=_orbax().args.JsonRestore())
            _check_same(facts, [d for d, _ in leaves], f"{self.folder}/{step}")
            wanted = {_name(i): _how(leaf) for i, (_, leaf) in enumerate(leaves) if leaf.size}
            restore = _orbax().args.PyTreeRestore(restore_args=wanted)
            stored = read(step, arrays=restore) if wanted else {}
        values = [_as_in(stored.get(_name(i)), leaf) for i, (_, leaf) in enumerate(leaves)]
        return jtu.tree_unflatten(jtu.tree_structure(target), values), facts["extra"]

    def steps(self) -> list[int]:
        """Complete checkpoints on disk, ascending. Needs no Orbax."""
        return steps_in(self.folder)

    def latest(self) -> int | None:
        """The last complete checkpoint, or `None`."""
        return max(self.steps(), default=None)

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of later steps: those of a future that is being done again."""
        for later in self.steps() if jax.process_index() == 0 else ():
            if later > step:
                _remove(self.folder / str(later))
        _from_all(True)  # the others wait until they are gone
        self.close()  # the manager remembers what it has listed

    def close(self) -> None:
        """Releases Orbax's threads. A later call opens them again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with _quiet():
                manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, step: int, stored: dict[str, Any], facts: dict[str, Any]) -> None:
        ocp, first = _orbax(), jax.process_index() == 0
        if any(_from_all(step in self.steps())):
            if first:
                _remove(self.folder / str(step))
            self.close()  # the manager remembers what it has listed
        if self._manager is None:
            for doomed in self.folder.glob("*.dropped") if first else ():
                shutil.rmtree(doomed, ignore_errors=True)
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                # Synchronous: `save` can then say truthfully whether the step is on disk.
                enable_async_checkpointing=False,
                multiprocessing_options=_among(f"save{self._failures}"),
            )
            _from_all(True)  # the folder is there
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Orbax refuses an empty tree; a state without leaves still has its facts.
        items: dict[str, Any] = {"facts": ocp.args.JsonSave(facts)}
        if stored:
            items["arrays"] = ocp.args.PyTreeSave(stored)
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise OSError("Orbax declined to save")
        # Not by Orbax: killed halfway, its deletion leaves a step that looks complete.
        for old in self.steps()[: -self._keep] if first else ():
            _remove(self.folder / str(old))

    def _give_up(self, step: int, error: Exception) -> None:
        if not self._warned:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            message = "checkpoint of step %d was not saved (%s); training goes on, on disk: %s"
            logger.warning(message, step, reason, self.steps())
        self._warned = True
        self._failures += 1
        # After an error the manager may hold a lock or a half-open step: start a new one.
        with contextlib.suppress(Exception):
            self.close()
        self._manager = None
        for draft in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(draft, ignore_errors=True)


def _from_all(fact: bool) -> list[bool]:
    """What every process says; none goes on before all have said it."""
    if jax.process_count() == 1:
        return [fact]
    return [bool(x) for x in multihost_utils.process_allgather(np.int32(fact))]


def _remove(step_folder: Path) -> None:
    # First under a name that `steps_in` does not list, so that a kill leaves no half checkpoint.
    doomed = step_folder.with_name(f"{step_folder.name}.dropped")
    shutil.rmtree(doomed, ignore_errors=True)
    step_folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _name(index: int) -> str:
    return f"{index:05d}"  # leaf paths hold dots and brackets, which Orbax reads as nesting


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _described(tree: PyTree) -> list[tuple[dict[str, Any], Any]]:
    """Every leaf with its path, shape and dtype as JSON."""
    described = []
    for path, leaf in jtu.tree_flatten_with_path(tree)[0]:
        name = jtu.keystr(path) or "the only leaf"
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"leaf {name} is a {type(leaf).__name__}, not an array; pass "
                "`eqx.partition(state, eqx.is_array)[0]` and put plain values into `extra`"
            )
        facts = {"path": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        described.append((facts, leaf))
    return described


def _storable(leaf: Any) -> Any:
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # Arrays committed to no device are host data: every process has its own equal copy.
    return leaf if _sharding(leaf) is not None else np.asarray(leaf)


def _sharding(leaf: Any) -> Any:
    """The sharding a leaf insists on, or `None` for one that may lie anywhere."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _how(leaf: Any) -> Any:
    ocp = _orbax()
    # A key's data has one dimension more than the key, so it is placed after reading.
    sharding = None if _is_key(leaf) else _sharding(leaf)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=tuple(leaf.shape)
    )


def _as_in(value: Any, target: Any) -> Any:
    """What was read, as the kind of leaf the target has; `None` stands for an empty array."""
    if value is None:
        value = np.zeros(target.shape, target.dtype)
    if isinstance(target, np.ndarray):
        return np.array(value)
    if _is_key(target):
        impl = jax.random.key_impl(target)
        value = jax.random.wrap_key_data(jnp.array(value), impl=impl)
    elif not isinstance(value, jax.Array):
        # Weak types steer promotion and compilation; only scalars can get theirs back.
        weak = getattr(target, "weak_type", False) and value.ndim == 0
        value = jnp.asarray(value.item()) if weak else jnp.array(value)
    sharding = _sharding(target)
    return value if sharding is None else jax.device_put(value, sharding)


def _check_same(facts: dict[str, Any], target: list[dict[str, Any]], where: str) -> None:
    if facts["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {where} has format {facts['format']}, this eqrl reads {_FORMAT}; use the "
            "eqrl that wrote it"
        )
    saved = facts["leaves"]
    missing = {"path": "nothing more", "shape": None, "dtype": ""}
    for i in range(max(len(saved), len(target))):
        have = saved[i] if i < len(saved) else missing
        want = target[i] if i < len(target) else missing
        if have != want:
            raise ValueError(
                f"checkpoint {where} belongs to another state: it has {_spelled(have)} where this "
                f"run has {_spelled(want)}; use the same model, algorithm and optimizer, or start "
                "a new run"
            )


def _spelled(leaf: dict[str, Any]) -> str:
    shape = leaf["shape"]
    return leaf["path"] if shape is None else f"{leaf['path']} {leaf['dtype']}{shape}"


def _check_json(value: Any, path: str) -> None:
    """Refuses what JSON would change silently: tuples, number keys, NumPy scalars, objects."""
    if value is None or type(value) in (str, int, float, bool):
        return
    if type(value) is list:
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]")
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _check_json(item, f"{path}[{key!r}]")
    else:
        raise ValueError(
            f"{path} is a {type(value).__name__} that JSON would not give back as it is; use "
            "str, int, float, bool, None, lists, and dicts with text keys"
        )


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[Callable[..., Any]]:
    """A function that reads one item of a step and changes nothing in `folder`."""
    # The folder may be that of another run, even of one still going on: opened for writing,
    # the manager would sweep away the step which that run is saving right now.
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_among("read"))
    with contextlib.closing(ocp.CheckpointManager(folder, options=options)) as manager:

        def read(step: int, **item: Any) -> Any:
            (name,) = item
            return manager.restore(step, args=ocp.args.Composite(**item))[name]

        yield read


def _among(prefix: str) -> Any:
    """Orbax waits for other processes with a time limit, and not through their devices.

    There, processes whose save has failed would take its next sum for the run's own next one. The
    prefix is new after a failure, so that nobody waits where another has stopped waiting.
    """
    every = None if jax.process_count() == 1 else set(range(jax.process_count()))
    return _orbax().options.MultiprocessingOptions(
        active_processes=every, barrier_sync_key_prefix=prefix if every else None
    )


def _orbax():
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ValueError(
            'orbax-checkpoint is not installed; `pip install "eqrl[checkpoint]"`, or save nothing'
        ) from error
    return ocp


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's running commentary off the terminal, and its hands off the root logger."""
    absl, root = logging.getLogger("absl"), logging.getLogger()
    level, handlers = absl.level, list(root.handlers)
    absl.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl.setLevel(level)
        # Its first message hangs a handler there, which would print every library's logs.
        root.handlers[:] = [handler for handler in root.handlers if handler in handlers]
