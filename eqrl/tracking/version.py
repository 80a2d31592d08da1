"""Which code made a run."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax


_SOURCE = Path(__file__).resolve().parent.parent


def code_version(*, devices: bool = True) -> dict[str, Any]:
    """The versions and the commit that a result depends on.

    Args:
        devices: also name the devices, which starts the jax backend.

    Returns:
        `git_commit` and `git_dirty` of the working tree that eqrl is imported from, both `None`
        where it is not under git; versions of eqrl, jax, equinox, optax and python; with
        `devices` also `platform`, `device` and `device_count`.
    """
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else None
    changes = _git("status", "--porcelain") if commit else None
    facts: dict[str, Any] = {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        **{name: _installed(name) for name in ("eqrl", "jax", "jaxlib", "equinox", "optax")},
    }
    if devices:
        facts["platform"] = jax.default_backend()
        facts["device"] = jax.devices()[0].device_kind
        facts["device_count"] = jax.device_count()
    return facts


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout with PYTHONPATH


def _git(*arguments: str) -> str | None:
    """The answer of git in eqrl's source folder, or `None` if there is none to be had."""
    # The source folder, not the current one: an installed eqrl in a virtual environment inside
    # the user's repository must not be given the user's commit; hence `ls-files` above.
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_SOURCE, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
