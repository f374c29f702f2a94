"""Sweeps over variants in worker processes, which neither stop nor go wrong silently."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from conftest import check_refusal
from forked import SUBPROCESS, Forked

from dydiff.experiments import workers
from dydiff.runs import read_run

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def processes(monkeypatch) -> list[tuple[Forked, int]]:
    """The worker processes that a sweep forks, each with the number of those that ran beside it at its start."""
    started: list[tuple[Forked, int]] = []

    def fork(*arguments, **options) -> Forked:
        beside = sum(process.poll() is None for process, _ in started)
        started.append((Forked(*arguments, **options), beside))
        return started[-1][0]

    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(**{**vars(SUBPROCESS), "Popen": fork}))
    return started


def test_sweep_with_a_failing_variant(run_stage, dataset, tmp_path, processes):
    variables = {"model_params.lr": [1e-3, 1e30, 2e-3]}
    options = ["--device=cpu", "--set=meta_data.num_workers=2"]
    outcome = run_stage("reward", dataset, *options, variables=variables)
    check_refusal(outcome, "1 of 3 variants failed", "lr=1e_30-s0/output.log", "--resume")
    runs = sorted((tmp_path / "runs").iterdir())
    assert f"FAILED: {runs[1]}: The training loss of RewardModel is not finite" in outcome.errors, "why is not told"
    assert [read_run(run)["status"] for run in runs] == ["finished", "failed", "finished"]
    assert [(run / "model.safetensors").exists() for run in runs] == [True, False, True]
    assert "error: " in (runs[1] / "output.log").read_text()
    besides = [beside for _, beside in processes]  # how many ran when each started; both of the first may end within one look
    assert besides[:2] == [0, 1] and max(besides) == 1, "variants did not run two at a time"

    # Resuming runs only what is not finished, and in its folder.
    outcome = run_stage("reward", dataset, *options, "--resume", variables=variables)
    check_refusal(outcome)
    assert outcome.output.count("Already finished") == 2 and sorted((tmp_path / "runs").iterdir()) == runs
    assert len(processes) == 3, "a finished variant ran again"
    assert not list(tmp_path.glob("**/*.part"))


def test_a_missing_dataset_is_told_before_any_worker_starts(run_stage, dataset, tmp_path, processes):
    variables = {"dataset_name": [dataset, "hopper-medium-v2", "maze2d-umaze-locl"]}
    outcome = run_stage("reward", dataset, variables=variables)
    check_refusal(outcome, "'hopper-medium-v2' is not on this machine")
    assert not processes and not (tmp_path / "runs").exists()
    outcome = run_stage("reward", dataset, variables={"dataset_name": [dataset, "maze2d-umaze-locl"]})
    check_refusal(outcome, "maze2d-umaze-local")


def test_shards_are_the_sweep_in_parts(run_stage, dataset, tmp_path):
    """As jobs of a cluster that share a folder: seeds that train together stay together, and every run is in one shard."""
    variables, both = {"td3_bc_params.alpha": [1.0, 2.0, 3.0]}, ["--device=cpu", "--set=rl_trainer_params.real_ratio=1"]
    both += ["--set=seeds=[0, 1]", "--set=rl_trainer_params.num_epochs=1", "--set=meta_data.num_workers=2"]
    first = run_stage("td3_bc", dataset, *both, "--shard=2/2", variables=variables)
    assert first.status == 0 and "Shard 2 of 2: 1 of 3 runs" in first.output, first.errors
    names = {folder.name.partition("-")[2] for folder in (tmp_path / "runs").iterdir()}
    assert names == {"td3_bc-alpha=2.0-s0", "td3_bc-alpha=2.0-s1"}
    listed = run_stage("td3_bc", dataset, *both, "--list", variables=variables)
    states = [line.split()[1:3] for line in listed.output.splitlines()[1:]]
    assert listed.status == 0 and states == [["new"], ["new"], ["finished", "1"], ["finished", "1"], ["new"], ["new"]]
    longer = run_stage("td3_bc", dataset, *both, "--set=rl_trainer_params.num_epochs=2", "--list", variables=variables)
    assert [line.split()[1:3] for line in longer.output.splitlines()[3:5]] == 2 * [["shorter", "1"]]
    of_shard = run_stage("td3_bc", dataset, *both, "--list", "--shard=2/2", variables=variables)
    assert of_shard.output.splitlines()[1:] == [line for line in listed.output.splitlines() if "finished" in line]
    assert run_stage("td3_bc", dataset, *both, "--shard=1/2", variables=variables).status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 6
    # More shards than runs: those that are left have nothing to do. And resumed, a shard looks at its own runs only.
    assert run_stage("td3_bc", dataset, *both, "--shard=4/4", variables=variables).status == 0
    again = run_stage("td3_bc", dataset, *both, "--shard=1/3", "--resume", variables=variables)
    assert again.status == 0 and again.output.count("Already finished") == 2
    assert len(list((tmp_path / "runs").iterdir())) == 6
    for wrong in ("0/2", "3/2", "2", "a/b"):
        assert f"'{wrong}' is not a part of a whole" in run_stage("td3_bc", dataset, f"--shard={wrong}").errors


def test_workers_find_the_package_whatever_lies_in_the_working_folder(run_stage, dataset, tmp_path, monkeypatch):
    """A clone of the repository has the package's name, and must not be taken for it from the folder around it."""
    (tmp_path / "dydiff").mkdir()
    (tmp_path / "dydiff" / "__init__.py").write_text("")  # in the place of what an editable installation lets go first
    monkeypatch.chdir(tmp_path)
    workers_too = "--set=meta_data.num_workers=2", "--set=rl_trainer_params.evaluation_worker=true"
    settings = "--set=rl_trainer_params.real_ratio=1", "--set=rl_trainer_params.num_epochs=1"
    outcome = run_stage("td3_bc", dataset, "--device=cpu", *workers_too, *settings, variables={"seed": [1, 2]})
    runs = sorted((tmp_path / "runs").iterdir())
    assert outcome.status == 0, [(run / "output.log").read_text() for run in runs]
    assert [read_run(run)["status"] for run in runs] == ["finished", "finished"]


def test_a_run_that_is_not_resumed_is_named_with_what_differs(run_stage, dataset, tmp_path):
    def run(*overrides: str, **variables: list) -> tuple[int, str]:
        changes = [f"--set={text}" for text in ("meta_data.exp_name=mine", "model_params.max_epochs=2", *overrides)]
        outcome = run_stage("reward", dataset, "--device=cpu", "--resume", *changes, variables=variables)
        assert outcome.status == 0, outcome.errors
        lines = [line for line in outcome.output.splitlines() if line.startswith("Starting a new run")]
        return len(list((tmp_path / "runs").iterdir())), "; ".join(lines)

    first, near = tmp_path / "runs" / "00000-mine-s0", "model_params.batch_size=16"
    assert run() == (1, "")
    assert run() == (1, "")
    count, told = run(near, "model_params.max_epochs=1")
    assert count == 2 and f"'{first}'" in told and "\n" not in told
    assert "other settings: model_params.batch_size was 32, now 16, model_params.max_epochs was 2, now 1." in told
    count, told = run(near)
    assert count == 3 and "00001-mine" in told and told.count(" was ") == 2, "not the nearest"
    # Another seed, experiment or value of what varies is another run, and one of many differences another thing.
    assert run("seed=1") == (4, "")
    assert run("meta_data.exp_name=other") == (5, "")
    changes = [f"model_params.{name}" for name in ("lr=0.01", "patience=1", "steps_per_epoch=1", "hidden_dims=[4]")]
    assert run(*changes, "model_params.max_epochs=3", "model_params.batch_size=8") == (6, "")


def test_sweep_passes_a_signal_on_and_waits(run_stage, dataset, tmp_path, processes):
    def interrupt_when_training(seconds: float) -> None:
        """Stand in for the pause between looks at the workers."""
        time.sleep(0.02)
        logs = list((tmp_path / "runs").glob("*/log.jsonl"))
        if len(logs) == 2 and all(log.stat().st_size for log in logs):
            # A terminal's Ctrl-C reaches every process of its session; a worker's second signal would cut its saving short.
            assert all(os.getsid(process.pid) == process.pid for process, _ in processes)
            os.kill(os.getpid(), signal.SIGTERM)

    variables = {"seed": [1, 2]}
    options = [
        "--device=cpu",
        "--set=meta_data.num_workers=2",
        "--set=model_params.max_epochs=100000",
        "--set=model_params.patience=100000",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "time", SimpleNamespace(sleep=interrupt_when_training))
        outcome = run_stage("reward", dataset, *options, variables=variables)
    check_refusal(outcome, "Stopped by SIGTERM", "Go on with: dydiff run -e ", "--resume")
    assert [process.poll() for process, _ in processes] == [1, 1]
    for run in (tmp_path / "runs").iterdir():
        assert read_run(run)["status"] == "interrupted" and (run / "state.safetensors").exists()


def test_workers_that_are_stopped_before_they_begin_leave_nothing_behind(run_stage, dataset, tmp_path, processes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "time", SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGTERM)))
        outcome = run_stage("reward", dataset, "--device=cpu", "--set=meta_data.num_workers=2", variables={"seed": [1, 2, 3]})
    check_refusal(outcome, "Stopped by SIGTERM")
    assert len(processes) == 2 and not (tmp_path / "runs").exists()


def test_workers_of_a_killed_sweep_save_and_stop(dataset, tmp_path):
    file = tiny.write_experiment(tmp_path / "sweep.yaml", "reward", dataset, {"seed": [1, 2]})
    changes = ["meta_data.num_workers=2", "model_params.max_epochs=100000", "model_params.patience=100000"]
    command = [sys.executable, "-m", "dydiff.cli", "run", "-e", str(file), "--device=cpu", f"--outdir={tmp_path / 'runs'}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    sweep = subprocess.Popen([*command, *(f"--set={change}" for change in changes)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list((tmp_path / "runs").glob("*/log.jsonl"))) == 2)
    finally:
        sweep.kill()
        sweep.wait()
    runs = list((tmp_path / "runs").iterdir())
    wait_for(lambda: all(read_run(run)["status"] == "interrupted" for run in runs))
    assert all((run / "state.safetensors").exists() for run in runs)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
