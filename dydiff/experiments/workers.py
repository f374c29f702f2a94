"""Runs the variants of an experiment: one in this process, several as worker processes dealt to the GPUs."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dydiff.child import module_command
from dydiff.data import check_dataset
from dydiff.device import find_device
from dydiff.errors import DydiffError, Interrupted
from dydiff.experiments.experiment import Experiment, load_experiment
from dydiff.experiments.identity import describe, find_own, label, name_nearest
from dydiff.experiments.stages import run_variants
from dydiff.progress import Progress, say
from dydiff.reports.tables import format_table
from dydiff.runs import list_settings, new_folder, nothing_left_empty, read_log, read_run, read_state, remove_unbegun
from dydiff.runs.drive import Interrupts

LOG = "output.log"


@dataclass(frozen=True)
class Job:
    """What one process is to train: a run's folder, and a command of `dydiff` that takes `--folder` and `--device`.

    Several seeds that train together are one job, with a folder each; `variants` are their indices in the experiment.
    """

    folder: Path
    command: list[str]
    variants: tuple[int, ...] = ()
    siblings: tuple[Path, ...] = ()  # the other folders
    continues: bool = False  # a run that finished, but now with more epochs

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.folder, *self.siblings


def run_all(
    file: str,
    overrides: Sequence[str],
    dataset: str | None,
    device: str | None,
    root: Path,
    resume: bool,
    shard: tuple[int, int] = (1, 1),
) -> None:
    """Run every variant of an experiment file under `root`, or of so many shards of them only one, counted from 1.

    Raises:
        DydiffError: the file is wrong, a dataset is missing (nothing is run), a variant failed (all others run; the message
            names the logs), or no such GPU.
    """
    experiment = load_experiment(file, list(overrides), dataset)
    named = [device] if device else [f"cuda:{index}" for index in experiment.meta.gpu]
    devices = [find_device(name) for name in named or ["auto"]]
    own = _take_shard(experiment, shard)
    if len(own) < len(experiment.groups):
        print(f"Shard {shard[0]} of {shard[1]}: {len(own)} of {len(experiment.groups)} runs.")
    with nothing_left_empty(root) as folders:
        jobs = _list_jobs(experiment, own, _worker_command(file, overrides, dataset, root), root, resume)
        folders += itertools.chain.from_iterable(job.folders for job in jobs)
        pending = skip_finished(jobs)
        if not pending:
            print("Nothing is left to do. A greater rl_trainer_params.num_epochs continues finished policies.")
        elif len(pending) == 1:
            (job,) = pending
            _run_variants(experiment, job.variants, job.folders, root, devices[0])
            for folder in job.folders:
                print(f"Run folder: {folder}")
        else:
            wanted = {experiment.variants[index].constants.dataset_name for job in pending for index in job.variants}
            for name in sorted(wanted):
                check_dataset(name)
            run_jobs(pending, devices, experiment.meta.num_workers)


def show_runs(file: str, overrides: Sequence[str], dataset: str | None, root: Path, shard: tuple[int, int] = (1, 1)) -> str:
    """The table of the runs that `run_all` is about: the state of each under `root`, its epochs and its folder.

    A run that finished with fewer epochs than it shall have now is `shorter`.

    Raises:
        DydiffError: the file or an override is wrong.
    """
    experiment, runs = load_experiment(file, list(overrides), dataset), list_settings(root)
    rows = [["run", "state", "epochs", "folder"]]
    for index in itertools.chain.from_iterable(_take_shard(experiment, shard)):
        variant, name = experiment.variants[index], experiment.meta.exp_name
        folder, shorter = find_own(runs, describe(name, variant))
        if folder is None:
            rows.append([label(name, variant), "new", "", ""])
            continue
        log, state = read_log(folder), "shorter" if shorter else read_state(folder)
        rows.append([label(name, variant), state, str(log[-1]["epoch"] if log else 0), str(folder)])
    return format_table(rows)


def _take_shard(experiment: Experiment, shard: tuple[int, int]) -> list[list[int]]:
    part, parts = shard
    return experiment.groups[part - 1 :: parts]


def list_jobs(file: Path, overrides: Sequence[str], root: Path) -> list[Job]:
    """The runs of an experiment file's variants under `root`, those that are there and those to be begun.

    Raises:
        DydiffError: the file or an override is wrong.
    """
    experiment = load_experiment(file, list(overrides))
    return _list_jobs(experiment, experiment.groups, _worker_command(str(file), overrides, None, root), root, resume=True)


def _worker_command(file: str, overrides: Sequence[str], dataset: str | None, root: Path) -> list[str]:
    changes = [word for text in overrides for word in ("--set", text)]
    return ["worker", "-e", file, "--outdir", str(root), *changes, *(["--dataset", dataset] if dataset else [])]


def _list_jobs(
    experiment: Experiment, groups: Sequence[Sequence[int]], command: list[str], root: Path, resume: bool
) -> list[Job]:
    jobs, name = [], experiment.meta.exp_name
    runs = list_settings(root) if resume else []
    for group in groups:
        folders, continues = {}, False
        for index in group:
            settings = describe(name, experiment.variants[index])
            folder, shorter = find_own(runs, settings)
            if folder is None:
                name_nearest(runs, settings)
            continues = continues or shorter
            if folder is not None and not shorter and len(group) > 1 and _is_finished(folder):
                print(f"Already finished: {folder}")  # the other seeds go on without it
                continue
            folders[index] = folder or new_folder(root, label(name, experiment.variants[index]))
        if folders:
            first, *siblings = folders.values()
            jobs.append(Job(first, [*command, "--variant", *map(str, folders)], tuple(folders), tuple(siblings), continues))
    return jobs


def skip_finished(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are not finished; names the others."""
    pending = []
    for job in jobs:
        if _is_finished(job.folder) and not job.continues:
            print(f"Already finished: {job.folder}")
        else:
            pending.append(job)
    return pending


def _is_finished(folder: Path) -> bool:
    return (read_run(folder) or {}).get("status") == "finished"


def run_job(
    file: str,
    overrides: Sequence[str],
    dataset: str | None,
    device: str,
    root: Path,
    indices: Sequence[int],
    folders: Sequence[Path],
) -> None:
    """Run one variant in its folder, or several seeds together in theirs: the body of a worker process."""
    _run_variants(load_experiment(file, list(overrides), dataset), indices, folders, root, find_device(device))


def _run_variants(experiment: Experiment, indices: Sequence[int], folders: Sequence[Path], root: Path, device: str) -> None:
    variants, meta = [experiment.variants[index] for index in indices], experiment.meta
    settings = [describe(meta.exp_name, variant) for variant in variants]
    run_variants(variants, folders, root, device, settings, meta.description)


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], num_workers: int) -> None:
    """Keep up to `num_workers` processes busy; a failed one never stops the others, and never goes unnoticed.

    Raises:
        Interrupted: a signal asked for the end; the workers have saved and stopped.
        DydiffError: some variants failed (names their logs).
    """
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_workers, 1)), **os.environ}  # the user's own wins
    queue, running, failed = list(jobs), {}, []
    free_slots = list(range(num_workers))
    with Progress("variants") as progress, Interrupts() as interrupts:
        progress.begin(len(jobs), "variants")
        try:
            while (queue or running) and not interrupts.received:
                while queue and free_slots:
                    job, slot = queue.pop(0), free_slots.pop(0)
                    command = [*module_command("dydiff.cli"), *job.command]
                    command += ["--folder", *map(str, job.folders), "--device", devices[slot % len(devices)], "--end_with_parent"]
                    with open(job.folder / LOG, "a") as log:
                        # In a session of its own a worker gets one signal, ours; from the terminal it would get a second.
                        # And from the pipe it learns that this process was killed.
                        process = subprocess.Popen(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=environment,
                            start_new_session=True,
                        )
                    running[process] = (job, slot)
                time.sleep(0.2)
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    process.stdin.close()
                    free_slots.append(slot)
                    progress.advance(1)
                    if process.returncode:
                        failed.append(job.folder)
                        say(f"FAILED: {job.folder}: {_last_line(job.folder / LOG)}")
                    else:
                        say(f"Finished: {job.folder}")
        finally:  # after an interrupt the workers save and stop
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            for job in (*queue, *(job for job, _ in running.values())):  # some perhaps never began
                for folder in job.folders:
                    remove_unbegun(folder, LOG)
    if interrupts.received:
        raise Interrupted(f"Stopped by {signal.Signals(interrupts.received).name}; the running variants have saved their state.")
    if failed:
        logs = ", ".join(str(folder / LOG) for folder in failed)
        raise DydiffError(
            f"{len(failed)} of {len(jobs)} variants failed: {logs}. Repair the cause and run again with --resume."
        )


def _last_line(log: Path) -> str:
    """How a process ended, in its own words."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "without a word")


def end_with_parent() -> None:
    """Ask this process to save and stop, as SIGTERM does, once nobody holds the other end of its standard input."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held while Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
