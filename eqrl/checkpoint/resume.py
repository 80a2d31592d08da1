"""What a run continues, from the names of files alone."""

from pathlib import Path
from typing import NamedTuple


class Resume(NamedTuple):
    """What a run continues.

    Attributes:
        folder: the folder for `Checkpoints`.
        step: the step to restore.
    """

    folder: Path
    step: int


def resolve_resume(mode: str | Path, folder: str | Path) -> Resume | None:
    """Decides what a run in `folder` continues. Reads names only; needs no Orbax.

    Args:
        mode: `"never"` starts fresh and wants a folder without a run; `"auto"` continues the
            latest checkpoint under `folder/checkpoints`, or starts fresh if there is none; anything
            else is the path of a run folder, of its `checkpoints` folder, or of one step in it.
        folder: the run folder.

    Returns:
        What to restore, or `None` to start fresh.

    Raises:
        ValueError: if the path has no checkpoint, or two runs would mix in one folder.
    """
    folder = Path(folder).absolute()
    if mode == "never":
        if _holds_run(folder):
            remedy = "choose another --run-dir, or continue it with --resume auto"
            raise ValueError(f"{folder} already holds a run; {remedy}")
        return None
    if mode == "auto":
        return _latest_in(folder / "checkpoints")
    found = _find(Path(mode).absolute())
    if found.folder != folder / "checkpoints" and _holds_run(folder):
        raise ValueError(
            f"--resume {mode} is another run than the one {folder} already holds; choose another "
            "--run-dir"
        )
    return found


def _find(path: Path) -> Resume:
    if not path.exists():
        raise ValueError(f"--resume {path} does not exist; pass a run folder, auto or never")
    if path.name.isdecimal() and int(path.name) in steps_in(path.parent):
        return Resume(path.parent, int(path.name))
    found = _latest_in(path / "checkpoints") or _latest_in(path)
    if found is None:
        remedy = "pass a run folder that has checkpoints/<step>, or --resume never"
        raise ValueError(f"--resume {path} holds no complete checkpoint; {remedy}")
    return found


def _latest_in(folder: Path) -> Resume | None:
    steps = steps_in(folder)
    return Resume(folder, steps[-1]) if steps else None


def _holds_run(folder: Path) -> bool:
    marks = ("metrics.jsonl", "exit_status.json")
    return any((folder / mark).exists() for mark in marks) or bool(steps_in(folder / "checkpoints"))


def steps_in(folder: Path) -> list[int]:
    """Complete checkpoints in a folder, ascending."""
    # Orbax renames a finished step to its bare number; drafts carry a suffix.
    if not folder.is_dir():
        return []
    found = (f for f in folder.iterdir() if f.name.isdecimal())
    return sorted(int(f.name) for f in found if (f / "_CHECKPOINT_METADATA").exists())
