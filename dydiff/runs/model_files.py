"""The models that runs make and use: the newest of a kind, and those with which a run began, wherever they lie now."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from dydiff.checkpoint import digest_file
from dydiff.data import Dataset
from dydiff.errors import DydiffError
from dydiff.runs import list_runs, read_run


def find_model(root: Path, kind: str, dataset: Dataset, path: str) -> Path:
    """Resolve `load_path` / `model_paths`: a checkpoint file, a run folder, or `auto` = the newest finished run on the dataset.

    Raises:
        DydiffError: nothing is there, or no finished run of that kind on that dataset lies under `root`.
    """
    product = "model.safetensors"
    if path != "auto":
        file = Path(path) / product if os.path.isdir(path) else Path(path)
        if not os.path.isfile(file):
            raise DydiffError(f"No {kind} checkpoint at '{path}'. Train it first, or correct the path (or use 'auto').")
        return file
    for folder, record in reversed(list_runs(root)):
        same_data = record.get("fingerprint") == dataset.fingerprint
        if record.get("kind") == kind and record.get("status") == "finished" and same_data and (folder / product).is_file():
            return folder / product
    raise DydiffError(
        f"No finished {kind} run on dataset '{dataset.name}' under '{root}'. Train one there first, or give its path "
        "instead of 'auto'."
    )


def recorded_models(folder: Path, root: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The models that the run in `folder` began with, as run.json names them: files by kind, and their digests then by file.

    A file that is not there any more, because its folder was moved, is found by its name and its folder's name under `root`: the
    digest tells that it is the same one. Both are empty for a run that has used none.

    Raises:
        DydiffError: a file is nowhere.
    """
    record = read_run(folder) or {}
    models, digests = record.get("models", {}), record.get("model_digests", {})
    files = {path: _find_again(path, digests.get(path), folder, root) for paths in models.values() for path in paths}
    present = {kind: [files[path] for path in paths] for kind, paths in models.items()}
    return present, {file: digests[path] for path, file in files.items() if path in digests}


def _find_again(path: str, digest: str | None, folder: Path, root: Path) -> str:
    def places() -> Iterator[Path]:
        yield Path(path)
        yield from sorted(Path(root).glob("/".join(["**", *map(glob.escape, Path(path).parts[-2:])])))

    if digest is not None:  # older runs have none
        for file in places():
            if os.path.isfile(file) and digest_file(file) == digest:
                return str(file.resolve())
    if os.path.isfile(path):  # with another content: it is for those who go on with the run to refuse it
        return path
    raise DydiffError(
        f"'{Path(folder) / 'run.json'}' names the model '{path}', with which the run began; it is not there, and under '{root}' no "
        f"'{'/'.join(Path(path).parts[-2:])}' has its content. Put the file back at one of the two places, or train a new run."
    )


def digest_models(models: dict[str, list[str]]) -> dict[str, str]:
    """The SHA-256 of every model file behind a run, in hexadecimal."""
    return {path: digest_file(Path(path)) for paths in models.values() for path in paths}


def check_unchanged(before: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to continue a run with other models than it began with, whose files bear the same names."""
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    if changed:
        raise DydiffError(
            f"The run began with another model than lies in {', '.join(changed)} now. Put the old file back, or start a new run."
        )
