"""The hook that gives a server new weights: a command, or an address."""

import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence

from ._http import Client, Unanswered
from ._process import end_group, end_of
from .engine import EngineError


def check_address(name: str, url: object) -> None:
    """Refuses what is no http(s) address.

    Args:
        name: of the option.
        url: its value.

    Raises:
        ValueError: with what it should be.
    """
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        good = False
    if not good:
        raise ValueError(
            f"{name}={url!r} must be an http(s) address such as 'http://127.0.0.1:8000/v1'"
        )


def check_reload(reload: str | Sequence[str] | None) -> None:
    """Refuses what cannot be a hook.

    Raises:
        ValueError: with what it should be.
    """
    if reload is None:
        return
    if isinstance(reload, str) and reload.startswith(("http://", "https://")):
        check_address("reload", reload)
    elif (
        isinstance(reload, str)
        or not isinstance(reload, Sequence)
        or not all(isinstance(word, str) for word in reload)
    ):
        raise ValueError(
            f"reload={reload!r} must be an http(s) address, or a command as a tuple of "
            'strings: ("./reload.sh", "{folder}")'
        )
    elif not any("{folder}" in word for word in reload):
        raise ValueError(
            f'reload={tuple(reload)!r} does not say where "{{folder}}" goes, the folder of the new '
            "weights"
        )


def run_reload(reload: str | Sequence[str], folder: str, client: Client, *, timeout: float) -> None:
    """Tells the server, or who runs it, that a checkpoint is there.

    Args:
        reload: a command, in which "{folder}" stands for the folder; or an address that gets
            `POST {"model_path": folder}`.
        folder: a Hugging Face checkpoint.
        client: of the server; its key goes to the address too, if it is on the same host.
        timeout: seconds it may take.

    Raises:
        EngineError: if it fails, with what it said.
    """
    if isinstance(reload, str):
        there = client.at(reload, timeout=timeout)
        try:
            said = there.once("", {"model_path": folder})
        except Unanswered as error:
            raise EngineError(f"reload={reload} gave no answer: {error}") from None
        finally:
            there.hang_up()
        if isinstance(said, dict) and said.get("success") is False:
            raise EngineError(
                f"reload={reload} did not take the weights of {folder}: {said.get('message')}"
            )
    else:
        words = [word.replace("{folder}", folder) for word in reload]
        _run(words, client.closed, timeout)


def _run(words: list[str], closed: threading.Event, timeout: float) -> None:
    if closed.is_set():
        raise EngineError("the engine was closed before the command of reload= was run")
    with tempfile.TemporaryFile() as log:
        try:
            # No pipe: a server that the command leaves behind would keep it open.
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(f"the command of reload= does not start: {error}") from None
        end = time.monotonic() + timeout
        try:
            while _running(child):
                if closed.is_set() or time.monotonic() > end:
                    why = "was closed" if closed.is_set() else f"took more than {timeout:g} s"
                    raise EngineError(f"the command of reload= {why}: {' '.join(words)}")
        finally:
            if child.returncode is None:
                end_group(child)
        if child.returncode:
            log.seek(0)
            last = end_of(log.read().decode(errors="replace"))
            raise EngineError(
                f"the command of reload= ended with status {child.returncode}: {last}"
            )


def _running(child: subprocess.Popen) -> bool:
    try:
        child.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False
