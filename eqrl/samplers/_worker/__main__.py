"""`python .../_worker MODULE SOCKET MEMORY`: starts the worker of that name in any environment.

The folder is imported as a package of its own, `eqrl_worker`, because the environment need not be
able to import eqrl, and because the names of its files must not hide other packages.
"""

import importlib.util
import pathlib
import sys


def main(module: str, socket: str, memory: str) -> None:
    """Runs `serve` of the module on two inherited file descriptors."""
    folder = pathlib.Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        "eqrl_worker", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["eqrl_worker"] = package
    spec.loader.exec_module(package)
    serve = importlib.import_module("eqrl_worker.serve").serve
    serve(importlib.import_module(f"eqrl_worker.{module}").start, int(socket), int(memory))


if __name__ == "__main__":
    sys.path.pop(0)
    main(*sys.argv[1:])
