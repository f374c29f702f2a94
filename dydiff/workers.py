"""Runs the variants of an experiment: one in this process, several as worker processes dealt to the GPUs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydiff.device import find_device
from dydiff.errors import DydiffError
from dydiff.experiment import Experiment, Variant, load_experiment
from dydiff.progress import Progress
from dydiff.runs import Interrupted, Interrupts, find_run_of, new_folder, read_run, removed_if_empty
from dydiff.stages import run_variant

LOG = "output.log"


def run_all(file: str, overrides: Sequence[str], dataset: str | None, device: str | None, root: Path, resume: bool) -> None:
    """Run every variant of an experiment file under `root`.

    Raises:
        DydiffError: the file is wrong, a variant failed (all others are run; the message names the logs), or no such GPU.
    """
    experiment = load_experiment(file, list(overrides), dataset)
    devices = [find_device(device)] if device else [find_device(f"cuda:{index}") for index in experiment.meta.gpu]
    if not devices:
        raise DydiffError("meta_data.gpu is empty; name a GPU, or use --device cpu.")
    name = experiment.meta.exp_name
    pending: list[tuple[int, Path]] = []
    for index, variant in enumerate(experiment.variants):
        folder = find_run_of(root, describe(name, variant)) if resume else None
        if folder is not None and read_run(folder)["status"] == "finished":
            print(f"Already finished: {folder}")
            continue
        pending.append((index, folder or new_folder(root, label(name, variant))))
    if len(pending) == 1:
        index, folder = pending[0]
        with removed_if_empty(folder):
            _run_variant(experiment, index, folder, root, devices[0])
        print(f"Run folder: {folder}")
        return
    arguments = ["-e", file, "--outdir", str(root)]
    arguments += [word for text in overrides for word in ("--set", text)] + (["--dataset", dataset] if dataset else [])
    _run_workers(pending, arguments, devices, experiment.meta.num_workers)


def run_one(
    file: str, overrides: Sequence[str], dataset: str | None, device: str, root: Path, index: int, folder: Path
) -> None:
    """Run one variant in its folder: the body of a worker process."""
    _run_variant(load_experiment(file, list(overrides), dataset), index, folder, root, find_device(device))


def _run_variant(experiment: Experiment, index: int, folder: Path, root: Path, device: str) -> None:
    variant, meta = experiment.variants[index], experiment.meta
    run_variant(variant, folder, root, device, describe(meta.exp_name, variant), meta.description)


def _run_workers(pending: list[tuple[int, Path]], arguments: list[str], devices: list[str], num_workers: int) -> None:
    """Keep up to `num_workers` processes busy; a failed one never stops the others, and never goes unnoticed.

    Raises:
        Interrupted: a signal asked for the end; the workers have saved and stopped.
        DydiffError: some variants failed (names their logs).
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_workers, 1))}
    queue, running, failed = list(pending), {}, []
    free_slots = list(range(num_workers))
    with Progress("variants") as progress, Interrupts() as interrupts:
        progress.begin(len(pending), "variants")
        try:
            while (queue or running) and not interrupts.received:
                while queue and free_slots:
                    (index, folder), slot = queue.pop(0), free_slots.pop(0)
                    command = [sys.executable, "-m", "dydiff.cli", "worker", *arguments, "--variant", str(index)]
                    command += ["--folder", str(folder), "--device", devices[slot % len(devices)]]
                    with open(folder / LOG, "a") as log:
                        # In a session of its own a worker gets one signal, ours; from the terminal it would get a second.
                        process = subprocess.Popen(
                            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                        )
                    running[process] = (folder, slot)
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    folder, slot = running.pop(process)
                    free_slots.append(slot)
                    progress.advance(1)
                    if process.returncode:
                        failed.append(folder)
                        progress.say(f"FAILED: {folder}, see {folder / LOG}")
                    else:
                        progress.say(f"Finished: {folder}")
        finally:  # after an interrupt the workers save and stop
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if interrupts.received:
        raise Interrupted(
            f"Stopped by signal {interrupts.received}; the running variants have saved their state. Continue with --resume."
        )
    if failed:
        logs = ", ".join(str(folder / LOG) for folder in failed)
        raise DydiffError(
            f"{len(failed)} of {len(pending)} variants failed: {logs}. Repair the cause and run again with --resume."
        )


def describe(experiment: str, variant: Variant) -> dict[str, Any]:
    """The resolved settings of a run: stored in its folder, and what identifies it when it is resumed."""
    constants = dataclasses.asdict(variant.constants)
    return {
        "experiment": experiment,
        "stage": variant.stage,
        "variables": variant.choices,
        "constants": {key: value for key, value in constants.items() if value is not None},
    }


def label(experiment: str, variant: Variant) -> str:
    """The name of a variant's run folder: the experiment and what sets the variant apart."""
    choices = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in variant.choices.items() if key != "seed"]
    return "-".join([experiment, *choices, f"s{variant.constants.seed}"])
