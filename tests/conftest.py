"""Settings of the whole test session, and the few fixtures that many tests share.

The environment is set before `jax` is imported, because jax reads it only then; subprocesses that
tests start inherit it.
"""

import os
import pathlib
import tempfile


os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the suite's time; a second run reads it from disk. The default thresholds
# skip small programs, which are half of it. The key holds the jax version.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "eqrl-test-jax-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests run each program once or twice: compiling it well costs more than running it slowly.
# Meshes are tested on eight devices that share this machine.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Every annotation in eqrl is checked at run time while tests run; the library itself never pays.
# An int is a legal float, as everywhere in Python's own typing.
install_import_hook("eqrl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


# Files that take a minute or more: with several processes, they come first, so that none of them is
# alone at the end.
_LONG = (
    "test_training_processes", "test_training", "test_logprobs", "test_contract", "test_update",
    "test_sharding", "test_asking", "test_turns", "test_samplers", "test_planning",
    "test_processes", "test_plan", "test_openai", "test_engines", "test_docs", "test_invariants",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_make_parametrize_id(val):
    # Names of tests must be the same in every process that collects them.
    return getattr(val, "__name__", None) if callable(val) else None


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are dropped before the next.

    Each holds some memory mappings, of which a Linux process may have 65,530: with the programs of
    the whole suite, XLA's compiler runs out of them and the process dies of a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def no_compilation_cache():
    """Programs for chips that are not here can be written to the cache and not read from it."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache  # pyright: ignore
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.fixture
def x64():
    """float64 within one test, for comparisons to 1e-10 and finite differences."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def getkey():
    """A function that returns a fresh PRNG key at each call, the same ones in every run."""
    counter = iter(range(1_000_000))

    def next_key() -> jax.Array:
        return jax.random.fold_in(jax.random.key(2036), next(counter))

    return next_key


@pytest.fixture
def root() -> pathlib.Path:
    """The repository's root folder."""
    return _ROOT


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder `../shared` with real data; skips where the checkout has none beside it."""
    folder = _ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared (real GSM8K), which is not beside this checkout")
    return folder
