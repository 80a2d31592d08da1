"""Weights & Biases, as a guest: it may be absent, locked or unreachable, and the run goes on."""

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from .base import logger
from .version import code_version


class Wandb:
    """A W&B run.

    Without an API key, or when the server does not answer within `timeout`, `online` becomes
    `offline` with one warning: all numbers then lie in `folder/wandb`, and `wandb sync` uploads
    them later. The id of the run is kept in `folder/wandb_id`, so that a resumed run continues
    the same W&B run.

    Args:
        mode: `"online"`, `"offline"`, or `"disabled"`, which does not even import wandb.
        project: project the run appears in.
        name: display name; W&B invents one for `None`.
        config: the resolved configuration; stored with the run, and the code version under `code`.
        folder: the run folder.
        run_id: W&B id of the run to continue; `None` for the one in `folder`, or a new one.
        timeout: seconds to wait for the server at the start; the end waits as long once more.

    Raises:
        ValueError: if wandb is wanted but not installed.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "offline", "disabled"],
        project: str = "eqrl",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        folder: str | Path = ".",
        run_id: str | None = None,
        timeout: int | float = 20.0,
    ):
        self.mode: str = mode
        self.run = None
        if mode == "disabled":
            return
        _import_wandb()
        Path(folder).mkdir(parents=True, exist_ok=True)
        arguments = {
            "project": project,
            "name": name,
            "config": {**(config or {}), "code": code_version()},
            "dir": str(folder),
            "id": run_id or _kept_id(Path(folder)),
            "resume": "allow",
        }
        reason = None
        if mode == "online":
            reason = _no_key()
            if reason is None:
                self.run, reason = _try("online", arguments, timeout)
        if self.run is None:
            self._start_offline(reason, arguments, timeout)

    def _start_offline(self, reason: str | None, arguments: dict[str, Any], timeout: int | float):
        self.run, trouble = _try("offline", arguments, timeout)
        self.mode = "disabled" if self.run is None else "offline"
        if self.run is None:
            both = "; ".join(filter(None, (reason, trouble)))
            logger.warning("wandb: %s; this run goes on without it", both)
        elif reason is not None:
            message = "wandb: %s; recorded offline instead, upload it later with `wandb sync %s`"
            logger.warning(message, reason, self.where)

    @property
    def where(self) -> str | None:
        """The run's address, or the folder of an offline run, or `None` when disabled."""
        if self.run is None:
            return None
        return self.run.url if self.mode == "online" else self.run.settings.sync_dir

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Sends metrics; calls with the same step are merged into one row."""
        # After a resume W&B ignores rows of steps it has already: they are equal anyway.
        if self.run is not None:
            self.run.log({key: float(value) for key, value in metrics.items()}, step=int(step))

    def finish(self, status: str) -> None:
        """Ends the run; any status but `"success"` marks it as failed."""
        run, self.run = self.run, None
        if run is not None:
            run.finish(exit_code=0 if status == "success" else 1)


def _import_wandb():
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            'wandb is not installed; `pip install "eqrl[examples]"`, or choose the mode "disabled"'
        ) from error
    return wandb


def _kept_id(folder: Path) -> str:
    kept = folder / "wandb_id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4) + "\n")
    return kept.read_text().strip()


def _no_key() -> str | None:
    """Why there is no key, or `None` if there is one. Never asks on the terminal."""
    wandb = _import_wandb()
    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        found = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key that is no key has exceptions of its own
        return f"the API key is refused ({str(error).splitlines()[0]})"
    return None if found else "no API key (set WANDB_API_KEY or run `wandb login`)"


def _try(mode: Literal["online", "offline"], arguments: dict[str, Any], timeout: int | float):
    """`(run, None)`, or `(None, why not)`."""
    wandb = _import_wandb()
    settings = wandb.Settings(
        init_timeout=timeout,
        finish_timeout=timeout,
        silent=True,
        console="off",  # the run folder has its own record; stdout stays the user's
    )
    start = time.monotonic()
    try:
        return wandb.init(mode=mode, settings=settings, **arguments), None
    # Network, proxy, quota, a wrong key, a full disk: W&B has its own and foreign exceptions for
    # each, and none of them is worth a training run.
    except Exception as error:
        seconds = time.monotonic() - start
        wandb.teardown()  # else its service keeps the run id taken, and offline cannot have it
        first_line = (str(error).strip().splitlines() or [""])[0]
        name = type(error).__name__
        return None, f"{mode} mode failed after {seconds:.0f} s ({name}: {first_line})"
