"""Several seeds of one experiment that train together: for the driver one stage and one run, on the disk a run folder each.

A seed's folder holds what it would hold had the seed trained alone, under the same settings; only the updates are computed for all
seeds at once (`Updates.together`). Rollouts, buffers, generators, evaluations and files are each seed's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dydiff.checkpoint import load_checkpoint
from dydiff.errors import DydiffError
from dydiff.runs import STATE, Run
from dydiff.trainer import PolicyTrainer, run_epochs
from dydiff.updates import Updates

NEXT_STATE = "next-state.safetensors"


class SeedRecord(dict):
    """What one seed logs of an epoch; `index` is the seed's place among its siblings."""

    def __init__(self, index: int, record: dict[str, float]):
        super().__init__(record)
        self.index = index


class SeedTrainers:
    """Policy trainers that differ in their seeds alone, as one stage; its run is a `SeedRuns`."""

    def __init__(self, trainers: Sequence[PolicyTrainer]):
        self.trainers = list(trainers)
        self.updates = Updates.together([trainer.updates for trainer in trainers])
        self._complete: list[tuple[int, SeedRecord]] = []

    @property
    def epoch(self) -> int:
        return self.trainers[0].epoch

    @property
    def finished(self) -> bool:
        return self.trainers[0].finished

    def run_epoch(self) -> None:
        """Train one epoch of every seed; `late_records` gives what to log."""
        for index, record in enumerate(run_epochs(self.trainers, self.updates)):
            if record is not None:
                self._complete.append((self.epoch, SeedRecord(index, record)))

    def late_records(self, wait: bool) -> list[tuple[int, SeedRecord]]:
        """Epochs and records of every seed that are complete and were not returned before; with `wait`, all are."""
        complete, self._complete = self._complete, []
        for index, trainer in enumerate(self.trainers):
            complete += [(epoch, SeedRecord(index, record)) for epoch, record in trainer.late_records(wait)]
        return complete

    def save_products(self, save: Callable[[int, str, str, Any, dict], None], final: bool) -> None:
        for index, trainer in enumerate(self.trainers):
            trainer.save_products(partial(save, index), final)


class SeedRuns:
    """The run folders of a `SeedTrainers`, all of which always hold a state of one common epoch."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)
        self.folder = " and ".join(str(run.folder) for run in runs)  # as messages name it

    def restore(self, stage: SeedTrainers) -> int:
        """Load the saved states, or save the initial ones; returns the epochs done.

        Raises:
            DydiffError: the seeds stand at different epochs, because they were not trained together before; all folders are then
                as they were.
        """
        names = self._find_states()
        for run, trainer, name in zip(self.runs, stage.trainers, names, strict=True):
            run.load(trainer, name)
        epochs = [trainer.epoch for trainer in stage.trainers]
        if len(set(epochs)) > 1:
            places = ", ".join(f"'{run.folder}' at {epoch}" for run, epoch in zip(self.runs, epochs, strict=True))
            raise DydiffError(
                f"Seeds that train together must stand at the same epoch, but these were trained apart: {places}. Finish those "
                "that are behind one by one: --set seed=N --resume."
            )
        for run, name in zip(self.runs, names, strict=True):  # finish or undo a `save_state` that was cut short
            if name == NEXT_STATE:
                os.replace(run.folder / NEXT_STATE, run.folder / STATE)
            (run.folder / NEXT_STATE).unlink(missing_ok=True)
        for run, trainer in zip(self.runs, stage.trainers, strict=True):
            run.begin(trainer)
        return epochs[0]

    def save_state(self, stage: SeedTrainers) -> int:
        """Write every seed's state, first beside the old ones: whenever this is cut short, `restore` finds a common epoch."""
        for run, trainer in zip(self.runs, stage.trainers, strict=True):
            run.save_state(trainer, NEXT_STATE)
        for run in self.runs:
            os.replace(run.folder / NEXT_STATE, run.folder / STATE)
        return stage.epoch

    def _find_states(self) -> list[str]:
        """The file of each run that holds the newest epoch which all can provide: a `save_state` may have been cut short."""
        if not any((run.folder / NEXT_STATE).is_file() for run in self.runs):
            return [STATE] * len(self.runs)
        names = [{_epoch_of(run.folder / name): name for name in (NEXT_STATE, STATE)} for run in self.runs]  # by epoch
        common = max(set.intersection(*map(set, names)) - {None}, default=None)
        return [STATE if common is None else each[common] for each in names]

    def log(self, epoch: int, record: SeedRecord) -> None:
        self.runs[record.index].log(epoch, record)

    def save(self, index: int, name: str, kind: str, tree: Any, manifest: dict[str, Any]) -> None:
        self.runs[index].save(name, kind, tree, manifest)

    def close(self, status: str) -> None:
        for run in self.runs:
            run.close(status)


def _epoch_of(file: Path) -> int | None:
    return load_checkpoint(file, "training state")[1]["epoch"] if file.is_file() else None
