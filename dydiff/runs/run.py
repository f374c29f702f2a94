"""Run folders: settings, logs, checkpoints, and how stages find each other's results.

A run folder holds `run.json` (what, on which data, whether it finished), `settings.yaml`, `log.jsonl`, TensorBoard events,
`state.safetensors` (everything that resuming needs) and the run's products (`model.safetensors`, `agent.safetensors`, ...).
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from dydiff import __version__
from dydiff.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from dydiff.data import Dataset
from dydiff.errors import DydiffError
from dydiff.runs.events import EventFile
from dydiff.runs.folders import LOCK, LOG, read_log, read_run
from dydiff.runs.tracking import Tracking, is_asked_for

STATE = "state.safetensors"


class Stage(Protocol):
    """Something that is trained epoch by epoch; `drive` logs, saves and resumes it."""

    epoch: int  # epochs done

    @property
    def finished(self) -> bool: ...

    def run_epoch(self) -> dict[str, float] | None:
        """Train one epoch and return what to log; None where that is not known yet and comes from `late_records`."""

    def late_records(self, wait: bool) -> list[tuple[int, dict[str, float]]]:
        """What to log of which epoch, for stages that return None; with `wait`, of all epochs until now."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs, as a tree of tensors and scalars."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save_products(self, save: Callable[[str, str, Any, dict], None], final: bool) -> None:
        """Hand the products due after this epoch to `save(file name, kind, tree, manifest)`."""


class Run:
    """One run folder, held by one process; `about` joins the dataset's name in every manifest.

    Nothing in the folder changes before `begin`: a run whose resuming is refused stays what it was.

    Raises:
        DydiffError: the folder cannot be written, another process works in it, or it holds another kind's or dataset's run.
    """

    def __init__(
        self, folder: Path, kind: str, dataset: Dataset, settings: dict[str, Any], about: dict[str, Any] | None = None
    ):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            raise DydiffError(f"Cannot write to the run folder '{folder}': {error}. Choose another --outdir.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DydiffError(f"Another process is working in '{folder}'. Wait for it, or choose another --outdir.") from error
        self.manifest = {"dataset": dataset.name, "fingerprint": dataset.fingerprint, **(about or {})}
        self._check_same(kind)
        self.kind = kind
        self.settings = settings
        self._begun = False
        self._events: EventFile | None = None  # once there is something to log
        self._tracking: Tracking | None = None

    def _check_same(self, kind: str) -> None:
        """A resumed run must be of the interrupted run's kind and on its data; whoever picks the folder compares settings."""
        record = read_run(self.folder)
        if record is None:
            return
        theirs = (record["kind"], record["fingerprint"])
        if theirs != (kind, self.manifest["fingerprint"]):
            raise DydiffError(
                f"'{self.folder}' holds a {record['kind']} run on dataset '{record['dataset']}', which is not this {kind} run "
                f"on '{self.manifest['dataset']}' (or the dataset's content has changed). "
                "Resume with the data it was started on."
            )

    def _write_status(self, status: str) -> None:
        record = {
            "kind": self.kind,
            **self.manifest,
            "status": status,
            "dydiff": __version__,
            "torch": torch.__version__,
            "updated": time.time(),
        }
        write_atomically(self.folder / "run.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))

    def save(self, name: str, kind: str, tree: Any, manifest: dict[str, Any]) -> None:
        """Write one checkpoint of this run; the manifest gains the dataset's name and fingerprint, and the settings."""
        save_checkpoint(self.folder / name, kind, tree, {**self.manifest, "settings": self.settings, **manifest})

    def log(self, epoch: int, record: dict[str, float]) -> None:
        """Append one line to log.jsonl and the same numbers to TensorBoard's event file.

        Raises:
            DydiffError: the disk is full or fails.
        """
        try:
            with open(self.folder / LOG, "a") as file:
                file.write(json.dumps({"epoch": epoch, **record}) + "\n")
            if self._events is None:
                self._events = EventFile(self.folder, epoch)
            self._events.add(epoch, record)
        except OSError as error:
            raise DydiffError(
                f"Cannot write the log '{self.folder / LOG}': {error.strerror or error}. Free space and continue with --resume; "
                f"the last saved state, {STATE}, is untouched."
            ) from error
        if self._tracking is not None:
            self._tracking.log(epoch, record)

    def restore(self, stage: Stage) -> int:
        """Load the saved state where there is one, then begin; returns the epochs done."""
        self.load(stage)
        return self.begin(stage)

    def load(self, stage: Stage, name: str = STATE) -> None:
        """Put what the file `name` holds into the stage, unless there is none.

        Raises:
            DydiffError: it is damaged, or does not fit the stage.
        """
        file = self.folder / name
        if not file.is_file():
            return
        state, manifest = load_checkpoint(file, "training state")
        try:
            torch.set_rng_state(state["torch_rng"])
            if state["cuda_rng"] is not None:
                torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])  # the job may see fewer cards now
            stage.load_state_dict(state["stage"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DydiffError(
                f"'{file}', written by dydiff {manifest['dydiff']}, perhaps on another device, does not fit this run "
                f"({' '.join(str(error).split())[:300]}). Continue where it was written, or remove it to start over."
            ) from error

    def begin(self, stage: Stage) -> int:
        """Note that the run goes on from where the stage is, save its state if none is, and forget log lines after it.

        Returns the epochs done.
        """
        if is_asked_for():
            self._tracking = Tracking(self.folder, self.settings, self.settings.get("experiment"))
        for leftover in self.folder.glob(".*.part"):  # what a killed process was writing; the lock says that nobody is now
            leftover.unlink()
        # First the status: with the settings of more epochs, what is still marked as finished would be taken for done.
        self._write_status("running")
        self._begun = True
        settings = yaml.safe_dump(self.settings, sort_keys=False)
        write_atomically(self.folder / "settings.yaml", lambda path: path.write_text(settings))
        if not (self.folder / STATE).is_file():
            self.save_state(stage)
        kept = [line for line in read_log(self.folder) if line["epoch"] <= stage.epoch]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.folder / LOG, lambda path: path.write_text(text))
        return stage.epoch

    def save_state(self, stage: Stage, name: str = STATE) -> int:
        """Write everything that resuming needs, into the file `name`; returns the epochs done."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        tree = {"stage": stage.state_dict(), "torch_rng": torch.get_rng_state(), "cuda_rng": cuda}
        self.save(name, "training state", tree, {"epoch": stage.epoch})
        return stage.epoch

    def close(self, status: str) -> None:
        """Note how the run ended, if it has begun, and let go of the folder; raises DydiffError where that cannot be written."""
        try:
            if self._begun:
                self._write_status(status)
        finally:
            if self._events is not None:
                self._events.close()
            if self._tracking is not None:
                self._tracking.close(status)
            self._lock.close()
