"""`python -m eqrl.samplers.install_sglang_jax [cpu|tpu|gpu] [FOLDER]`: that engine's environment.

A virtual environment of its own, because the engine pins jax, flax, numpy and transformers to
versions that eqrl does not run on.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

from ._worker.sglang_jax import VERSION
from .sglang_jax import ENVIRONMENT


# Of Python; the engine allows no other.
_VERSIONS = ("3.12", "3.13")


def find_python() -> str | None:
    """An interpreter that the engine runs on: this one, or one on the path or under pyenv."""
    found = [sys.executable]
    found += [path for v in _VERSIONS if (path := shutil.which(f"python{v}"))]
    pyenv = pathlib.Path.home() / ".pyenv" / "versions"
    found += [str(path) for v in _VERSIONS for path in sorted(pyenv.glob(f"{v}.*/bin/python"))]
    for python in found:
        told = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
        )
        if told.returncode == 0 and told.stdout.strip() in _VERSIONS:
            return python
    return None


def install(kind: str, folder: pathlib.Path) -> None:
    """Makes the environment.

    Args:
        kind: `cpu`, `tpu` or `gpu`.
        folder: where to; what is there is replaced.

    Raises:
        ValueError: if there is no Python for it, or the installation fails.
    """
    python = find_python()
    if python is None:
        raise ValueError(
            f"sglang-jax needs Python {' or '.join(_VERSIONS)}, and there is none here"
        )
    target = f"sglang-jax[{kind}]=={VERSION}"
    uv, inside = shutil.which("uv"), str(folder / "bin" / "python")
    make = (
        [uv, "venv", "-q", "--clear", "--python", python]
        if uv
        else [python, "-m", "venv", "--clear"]
    )
    fill = (
        [uv, "pip", "install", "-q", "--prerelease=allow", "--python", inside]
        if uv
        else [inside, "-m", "pip", "install", "-q"]
    )
    for command in ([*make, str(folder)], [*fill, target]):
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise ValueError(f"`{' '.join(command)}` failed; its words are above")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("kind", nargs="?", default="cpu", choices=("cpu", "tpu", "gpu"))
    parser.add_argument("folder", nargs="?", default=ENVIRONMENT, type=pathlib.Path)
    given = parser.parse_args()
    try:
        install(given.kind, given.folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"sglang-jax {VERSION} is in {given.folder}")


if __name__ == "__main__":
    main()
