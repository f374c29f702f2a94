"""Run folders from outside: which there are, what they hold, which one to go on with, and new ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dydiff.errors import DydiffError

LOG = "log.jsonl"
LOCK = ".lock"


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run.json of a folder, or None where there is none of ours that can be read."""
    try:
        record = json.loads((Path(folder) / "run.json").read_text())
    except (OSError, ValueError):
        return None
    needed = {"kind", "dataset", "fingerprint", "status", "updated"}
    return record if isinstance(record, dict) and needed <= record.keys() else None


def read_state(folder: Path) -> str:
    """How far a run is: new, running, finished, failed, interrupted (by a signal, saved), or killed."""
    record = read_run(folder)
    if record is None:
        return "new"
    return record["status"] if record["status"] != "running" or _is_held(folder) else "killed"


def _is_held(folder: Path) -> bool:
    """Whether a process works in a run folder."""
    try:
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def read_log(folder: Path) -> list[dict[str, float]]:
    """The records of a run's log.jsonl, up to the first line that is none: a kill may have cut the last one short."""
    try:
        lines = (Path(folder) / LOG).read_text().splitlines()
    except (OSError, ValueError):
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "epoch" not in record:
            break
        records.append(record)
    return records


def list_runs(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All runs under a folder with their run.json, oldest first."""
    found = [(file.parent, read_run(file.parent)) for file in Path(root).glob("**/run.json")]
    return sorted(((folder, record) for folder, record in found if record), key=lambda item: item[1]["updated"])


def list_settings(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The run folders under `root` and the settings that each was started with, newest first."""
    stored = ((folder, read_settings(folder)) for folder, _ in reversed(list_runs(root)))
    return [(folder, settings) for folder, settings in stored if settings]


def find_run_of(
    runs: Sequence[tuple[Path, dict[str, Any]]],
    settings: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda stored: stored,
) -> Path | None:
    """The first of `runs` with exactly these settings, or None.

    `complete` adds to stored settings what they lack because they were written before it could be chosen.
    """
    return next((folder for folder, stored in runs if stored == settings or complete(stored) == settings), None)


def find_unfinished(
    folder: Path, settings: dict[str, Any], free: Sequence[str], to_options: Callable[[dict[str, Any]], dict[str, Any]]
) -> Path:
    """Check that `folder` (or the folder of a file in it) holds an unfinished run with these settings, but for the `free` ones.

    Free settings are lengths: a finished run counts as unfinished when one is greater now, and is left alone otherwise.
    `to_options` gives the options, by name, that settings come from: those that messages speak of.

    Raises:
        DydiffError: no run there, one that is finished, or one with other settings (names them).
    """
    folder = folder.parent if os.path.isfile(folder) else folder
    record, theirs = read_run(folder), read_settings(folder)
    if record is None or theirs is None:
        raise DydiffError(f"'{folder}' is not a run folder, so there is nothing to resume.")
    different = [key for key in settings if theirs.get(key) != settings[key] and key not in free]
    if different:
        before, now = to_options({**settings, **theirs}), to_options(settings)
        changed = [name for name in now if before[name] != now[name] and name.lstrip("-") not in free]
        pairs = ", ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed)
        raise DydiffError(f"The run in '{folder}' was started with other settings: {pairs}. Repeat its options to resume it.")
    if record["status"] == "finished" and not any(settings[key] > theirs[key] for key in free):
        remedy = f" A longer {' or '.join(f'--{key}' for key in free)} would continue it." if free else ""
        raise DydiffError(f"The run in '{folder}' is finished; there is nothing to resume.{remedy}")
    return folder


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings.yaml of a run folder, or None where there is none that can be read."""
    try:
        settings = yaml.safe_load((Path(folder) / "settings.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


@contextlib.contextmanager
def nothing_left_empty(root: Path) -> Iterator[list[Path]]:
    """When the work fails, take away what it made and left empty: the run folders that it appends to the list, and `root`."""
    new = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    folders: list[Path] = []
    try:
        yield folders
    except BaseException:
        for folder in folders:
            remove_unbegun(folder)
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


def remove_unbegun(folder: Path, *besides: str) -> None:
    """Remove a run folder in which no run has begun: one that holds at most the files `besides`."""
    with contextlib.suppress(OSError):
        if {LOCK, *besides}.issuperset(os.listdir(folder)):
            for name in os.listdir(folder):
                (folder / name).unlink()
            folder.rmdir()


def new_folder(root: Path, name: str) -> Path:
    """A fresh run folder `NNNNN-name` under `root`, numbered after the ones that exist.

    Raises:
        DydiffError: the folder cannot be created.
    """
    root = Path(root)
    slug = re.sub(r"[^A-Za-z0-9._=-]+", "_", name)[:150]  # file systems stop at 255 bytes
    try:
        while True:
            root.mkdir(parents=True, exist_ok=True)
            numbers = [int(match[1]) for entry in os.listdir(root) if (match := re.match(r"(\d{5})-", entry))]
            folder = root / f"{max(numbers, default=-1) + 1:05d}-{slug}"
            try:
                folder.mkdir()
                return folder
            except (FileExistsError, FileNotFoundError):  # a sibling process took the number, or removed a root that was empty
                continue
    except OSError as error:
        raise DydiffError(f"Cannot create a run folder in '{root}': {error}. Choose another --outdir.") from error
