"""What a run must not do in a week: grow in memory, handles or threads, or log more and more; its events are readable meanwhile.

The quick version is part of every test run; `python -m pytest -m long tests/test_long_runs.py -s` runs thousands of epochs of every
stage and prints what it measured.
"""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dydiff.diffusion.training import DiffusionTrainer
from dydiff.experiments.stages import OneStepStage
from dydiff.runs import read_log
from dydiff.trainer import PolicyTrainer

PAGE = os.sysconf("SC_PAGE_SIZE")
STAGES = {"diffusion": DiffusionTrainer, "dynamics": OneStepStage, "reward": OneStepStage}
SECTIONS = {"dynamics": "dyn_model_params", "reward": "model_params"}


@dataclass
class Use:
    """What a process holds, at the end of each epoch."""

    memory: list[int] = field(default_factory=list)  # resident bytes, with those of its children
    handles: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)  # epochs that a reader finds in the event files, now and then

    def look(self) -> None:
        if len(self.memory) % 100 == 0:  # safetensors leaves two small cycles a tensor saved, which Python collects now and then
            gc.collect()
        children = Path("/proc/self/task").glob("*/children")
        pids = ["self", *(pid for file in children for pid in file.read_text().split())]
        self.memory.append(sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in pids))
        self.handles.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(threading.active_count())


def last_event(run: Path) -> int:
    """The newest epoch in a run's event files, as TensorBoard reads them."""
    return max(event.step for file in run.glob("events.*") for event in EventFileLoader(str(file)).Load())


def run_long(monkeypatch, run_stage, train, root: Path, dataset: str, stage: str, epochs: int, *more: str) -> tuple[Use, Path]:
    """Run a stage for so many epochs, looking at what the process holds after each."""
    use, kind = Use(), STAGES.get(stage, PolicyTrainer)
    run_epoch = kind.run_epoch

    def watched(self):
        if len(use.memory) in (epochs // 12, epochs // 6, epochs // 4):  # before a third: reading takes memory too
            (run,) = root.glob("0*")
            use.events.append(last_event(run) - len(read_log(run)))
        record = run_epoch(self)
        use.look()
        return record

    monkeypatch.setattr(kind, "run_epoch", watched)
    if stage == "diffusion":
        outcome = train(dataset, "--tick=0.008", f"--duration={8e-6 * epochs}", *more)
    else:
        changes = {"rl_trainer_params.num_epochs": epochs}
        if section := SECTIONS.get(stage):
            changes = {f"{section}.max_epochs": epochs, f"{section}.patience": 100_000}
        settings = [f"--set={key}={value}" for key, value in changes.items()]
        outcome = run_stage(stage, dataset, "--device=cpu", *settings, *more, root=root)
    assert outcome.status == 0, outcome.errors
    assert len(use.memory) == epochs
    (run,) = (folder for folder in root.glob("0*") if len(read_log(folder)) == epochs)
    return use, run


def growth(values: list[int]) -> float:
    """By how much values rise an epoch, over the last two thirds: the median between spans, so that what is allocated once does
    not count, and a leak does in every span."""
    settled = values[len(values) // 3 :]
    spans = np.array_split(settled, 8)
    rises = np.diff([span.mean() for span in spans]) / (len(settled) / len(spans))
    return float(np.median(rises))


def check_flat(use: Use, run: Path, bytes_an_epoch: float) -> str:
    """Nothing grows; returns what was measured in one line."""
    settled = len(use.memory) // 3
    assert max(use.handles[settled:]) <= max(use.handles[:settled]) and max(use.threads[settled:]) <= max(use.threads[:settled])
    assert all(missing in (0, 1) for missing in use.events) and len(use.events) == 3, "events lag behind the log"
    lengths = [len(line) for line in (run / "log.jsonl").read_text().splitlines()]
    half = len(lengths) // 2
    assert sum(lengths[half:]) < 1.2 * sum(lengths[:half]) * (len(lengths) - half) / half, "later epochs log more"
    events = sum(file.stat().st_size for file in run.glob("events.*"))
    memory = growth(use.memory)
    assert memory < bytes_an_epoch, f"{memory:.0f} bytes an epoch"
    return (
        f"{len(use.memory)} epochs: {use.memory[settled] / 1e6:.1f} MB at a third, {use.memory[-1] / 1e6:.1f} MB at the end "
        f"({memory:+.0f} bytes an epoch), {use.handles[settled]} -> {use.handles[-1]} handles, "
        f"{sum(lengths) / len(lengths):.0f} bytes of log and {events / len(lengths):.0f} of events an epoch"
    )


@pytest.mark.parametrize("stage", ["reward", "td3_bc"])
def test_a_hundred_epochs_hold_what_ten_do(monkeypatch, run_stage, train, dataset, trained, tmp_path, stage):
    use, run = run_quickly(monkeypatch, run_stage, train, dataset, trained, tmp_path, stage, 120)
    check_flat(use, run, bytes_an_epoch=20_000)


def run_quickly(monkeypatch, run_stage, train, dataset, trained, tmp_path, stage, epochs, *more):
    models = [f"--set=diff_model_params.model_paths={path_of(trained, 'diffusion model')}"]
    models += [f"--set=dyn_model_params.load_path={path_of(trained, 'dynamics model')}"]
    models += [f"--set=model_params.load_path={path_of(trained, 'reward model')}"]
    options = [] if stage in STAGES else [*models, *more]
    return run_long(monkeypatch, run_stage, train, tmp_path / "runs", dataset, stage, epochs, *options)


def path_of(trained: Path, kind: str) -> Path:
    """The product of the finished run of a kind."""
    return next(file for file in trained.glob("*/model.safetensors") if kind in (file.parent / "run.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize(
    "stage, epochs, more",
    [
        ("diffusion", 5000, []),
        ("dynamics", 5000, []),
        ("reward", 5000, []),
        ("td3_bc", 5000, ["--set=rl_trainer_params.freq_saving=100"]),
        ("td3_bc", 3000, ["--set=rl_trainer_params.freq_saving=100", "--set=rl_trainer_params.evaluation_worker=true"]),
        ("td3_bc", 3000, ["--set=rl_trainer_params.freq_saving=100", "--set=rl_trainer_params.update_mode=compiled"]),
        ("diffusion_ql", 3000, ["--set=rl_trainer_params.freq_saving=100"]),
        ("cql", 3000, ["--set=rl_trainer_params.freq_saving=100"]),
    ],
)
def test_thousands_of_epochs(monkeypatch, run_stage, train, dataset, trained, tmp_path, stage, epochs, more):
    use, run = run_quickly(monkeypatch, run_stage, train, dataset, trained, tmp_path, stage, epochs, *more)
    print(f"\n{stage} {' '.join(more)}: {check_flat(use, run, bytes_an_epoch=1000)}")
