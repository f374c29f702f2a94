"""A run that is killed again and again ends exactly where an undisturbed one does.

Commands run in children of a fork server (forked.py).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from conftest import DATASET
from forked import children, run_script

from dydiff.capture import can_compile
from dydiff.checkpoint import load_checkpoint
from dydiff.models import DIFFUSION, DYNAMICS, POLICY, REWARD
from dydiff.runs import read_log, read_run

KINDS = {"diffusion": DIFFUSION, "dynamics": DYNAMICS, "reward": REWARD}


class Workplace:
    """One stage's command in a folder of its own, started as often as it takes."""

    def __init__(self, stage: str, root: Path, dataset_folder: Path, trained: Path | None, more: tuple[str, ...] = ()):
        self.stage = stage
        self.more = more
        self.root = root
        self.environment = {"D4RL_DATASET_DIR": str(dataset_folder)}
        root.mkdir()
        self.trained = trained
        if stage != "diffusion":
            self.file = tiny.write_experiment(root / "experiment.yaml", stage, DATASET)

    def find_run(self) -> Path | None:
        """The folder of the run, once the run is recorded in it."""
        found = [file.parent for file in self.root.glob("*/run.json") if (file.parent / "settings.yaml").is_file()]
        assert len(found) <= 1, "resuming started another run"
        return found[0] if found else None

    def start(self) -> multiprocessing.Process:
        run = self.find_run()
        if self.stage == "diffusion":
            resume = [f"--resume={run}"] if run else []
            # Of the networks, the transformer alone draws from torch's global generator while it trains.
            arguments = ["-m", DATASET, "--rl_model_type=Transformer_RL", *tiny.TRAIN, *self.more, f"--outdir={self.root}", *resume]
        else:
            arguments = ["-e", str(self.file), "--device=cpu", f"--outdir={self.root}", "--resume", *self._models(), *self.more]
        script = "train.py" if self.stage == "diffusion" else "run_experiment.py"
        process = children.Process(target=run_script, args=(script, arguments, self.environment, self.root / "output"))
        process.start()
        return process

    def _models(self) -> list[str]:
        if self.stage in ("dynamics", "reward"):
            return []
        path = {read_run(file.parent)["kind"]: file for file in self.trained.glob("*/model.safetensors")}
        return [
            f"--set=diff_model_params.model_paths={path[DIFFUSION]}",
            f"--set=dyn_model_params.load_path={path[DYNAMICS]}",
            f"--set=model_params.load_path={path[REWARD]}",
        ]

    def finish(self) -> Path:
        process = self.start()
        process.join()
        assert process.exitcode == 0, (self.root / "output").read_text()
        run = self.find_run()
        assert read_run(run)["status"] == "finished"
        return run

    def interrupt(self, number: int, epochs: int, delay: float) -> bool:
        """Start, and send a signal soon after a new line has brought the log to `epochs`; whether it came before the end."""
        run = self.find_run()
        epochs = max(epochs, len(read_log(run)) + 1 if run else 1)
        process = self.start()
        while process.is_alive() and not ((run := self.find_run()) and len(read_log(run)) >= epochs):
            time.sleep(0.002)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it may be faster than we are
            os.kill(process.pid, number)
        process.join(30)
        status = read_run(self.find_run())["status"]
        # At once: SIGKILL at any instant; SIGTERM where no epoch's end is waited for, with 130 or, while Python ends, by itself.
        expected = {0: ["finished"], -number: ["running", "interrupted", "finished"]}
        if number == signal.SIGTERM:
            expected |= {1: ["interrupted"], 130: ["interrupted", "finished"]}
        assert status in expected.get(process.exitcode, []), (process.exitcode, status, (self.root / "output").read_text())
        return status != "finished"


def products(run: Path, stage: str) -> dict[str, object]:
    kind = KINDS.get(stage, POLICY)
    return {file.name: load_checkpoint(file, kind) for file in run.glob("*.safetensors") if file.name != "state.safetensors"}


def log_without_times(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read_log(run)]


def assert_equal_trees(one: object, other: object, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_trees(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(*pair, f"{where}.{index}")
    else:
        assert one == other, where


STAGES = ["diffusion", "dynamics", "reward", "td3_bc", "diffusion_ql", "cql"]
# Updates compiled by Inductor, and a process that evaluates beside them.
COMPILED = [("td3_bc", ("--set=rl_trainer_params.update_mode=compiled", "--set=rl_trainer_params.evaluation_worker=true"))]
COMPILED *= can_compile(torch.device("cpu"))


@pytest.mark.parametrize("stage, more", [*((stage, ()) for stage in STAGES), *COMPILED])
def test_killed_run_ends_like_an_undisturbed_one(stage, more, dataset_folder, trained, tmp_path):
    undisturbed = Workplace(stage, tmp_path / "undisturbed", dataset_folder, trained, more).finish()
    expected, log = products(undisturbed, stage), log_without_times(undisturbed)
    assert expected and [line["epoch"] for line in log] == list(range(1, len(log) + 1))

    disturbed = Workplace(stage, tmp_path / "disturbed", dataset_folder, trained, more)
    instants = random.Random(stage)
    kept = []  # what the log holds when a state has surely been saved
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    signals = signals[:1] if more else signals  # compiling takes seconds at every start
    for number, epochs in zip(signals, sorted(instants.sample(range(1, len(log)), len(signals))), strict=True):
        in_time = disturbed.interrupt(number, epochs, delay=instants.uniform(0, 0.02))
        run = disturbed.find_run()
        if not in_time:
            break
        if read_run(run)["status"] == "interrupted":
            kept = read_log(run)
            assert load_checkpoint(run / "state.safetensors", "training state")[1]["epoch"] == kept[-1]["epoch"]
    else:
        assert disturbed.finish() == run
    assert_equal_trees(products(run, stage), expected)
    assert log_without_times(run) == log
    assert read_log(run)[: len(kept)] == kept, "epochs before the saved state were repeated"
    assert not list(run.glob(".*.part")), "a half-written file outlived the resumed run"


@pytest.mark.parametrize("stage, more", [("td3_bc", ()), ("diffusion_ql", ("--set=diffql_params.lr_decay=false",))])
def test_a_finished_policy_goes_on_with_more_epochs(stage, more, dataset_folder, trained, tmp_path):
    whole = Workplace(stage, tmp_path / "whole", dataset_folder, trained, (*more, "--set=rl_trainer_params.num_epochs=8")).finish()
    place = Workplace(stage, tmp_path / "parts", dataset_folder, trained, (*more, "--set=rl_trainer_params.num_epochs=5"))
    first = place.finish()
    assert len(read_log(first)) == 5
    place.more = (*more, "--set=rl_trainer_params.num_epochs=8")
    assert place.finish() == first, "it began anew"
    assert log_without_times(first) == log_without_times(whole)
    # Others were saved under the settings of their time.
    assert_equal_trees(*(products(run, stage)["agent.safetensors"] for run in (first, whole)))

    place.more = (*more, "--set=rl_trainer_params.num_epochs=6")  # there is no way back
    process = place.start()
    process.join()
    assert process.exitcode == 0 and len(list(place.root.glob("*/run.json"))) == 2 and len(read_log(first)) == 8


def test_epochs_that_shape_a_training_begin_anew(dataset_folder, trained, tmp_path):
    place = Workplace("diffusion_ql", tmp_path / "place", dataset_folder, trained, ("--set=rl_trainer_params.num_epochs=2",))
    place.finish()
    place.more = ("--set=rl_trainer_params.num_epochs=3",)  # its learning rate falls over all of them
    process = place.start()
    process.join()
    assert process.exitcode == 0
    assert sorted(len(read_log(file.parent)) for file in place.root.glob("*/run.json")) == [2, 3]


LONGER = {
    "diffusion": ("--duration=0.002",),
    "dynamics": ("--set=dyn_model_params.max_epochs=60", "--set=dyn_model_params.patience=60"),
    "reward": ("--set=model_params.max_epochs=60", "--set=model_params.patience=60"),
}
KILLS = 24


@pytest.mark.long
@pytest.mark.parametrize("stage, more", [*((stage, ()) for stage in STAGES), *COMPILED])
def test_dozens_of_kills_at_any_instant(stage, more, dataset_folder, trained, tmp_path):
    """Signals between the start of the process and its end, saving, evaluating and importing included; run after run."""
    more += LONGER.get(stage, ("--set=rl_trainer_params.num_epochs=20",))
    began = time.monotonic()
    undisturbed = Workplace(stage, tmp_path / "undisturbed", dataset_folder, trained, more).finish()
    patience = time.monotonic() - began  # seconds within which a signal comes
    expected, log = products(undisturbed, stage), log_without_times(undisturbed)
    instants, kills, runs = random.Random(f"{stage} {more}"), 0, 0
    while kills < KILLS:
        disturbed = Workplace(stage, tmp_path / f"disturbed-{runs}", dataset_folder, trained, more)
        runs += 1
        while (run := disturbed.find_run()) is None or read_run(run)["status"] != "finished":
            process = disturbed.start()
            process.join(instants.uniform(0, patience))
            if process.is_alive():
                kills += 1
                patience *= 1.1  # so that every run gets through in the end
                os.kill(process.pid, instants.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                process.join(60)
            assert process.exitcode in (0, 1, 130, -signal.SIGKILL, -signal.SIGTERM), (disturbed.root / "output").read_text()
        patience *= 0.6
        assert_equal_trees(products(run, stage), expected)
        assert log_without_times(run) == log
    print(f"\n{stage} {' '.join(more)}: {kills} kills in {runs} runs of {len(log)} epochs; equal weights and logs")
