"""Runs and their folders: what a run leaves there, what goes on in it, and what does not."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal

import pytest
from conftest import DATASET, check_refusal

from dydiff.diffusion.training import DiffusionTrainer
from dydiff.runs import read_log, read_run


def test_dry_run_writes_nothing(train, dataset, tmp_path):
    outcome = train(dataset, "--dry-run")
    assert outcome.status == 0 and "windows of 8 x 6" in outcome.errors
    assert "--ramp 10 (millions of windows) Adam's step size gets to 0.00% of --lr, which learns little. Take" in outcome.errors
    assert "--ramp" not in train(dataset, "--dry-run", "--duration=4").errors
    assert not (tmp_path / "runs").exists()


def test_resume_of_the_diffusion_training_wants_the_same_options(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    check_refusal(train(dataset, f"--resume={run}"), "is finished")
    check_refusal(train(dataset, f"--resume={run}", "--lr=0.1"), "other settings: --lr was 0.001, now 0.1. Repeat")
    told = "--max_length_of_trajectory was 8, now 16, --tick was 0.04, now 2.0. Repeat"
    check_refusal(train(dataset, f"--resume={run}", "--tick=2", "--max_length_of_trajectory=16", "--duration=1"), told)
    check_refusal(train(dataset, f"--resume={tmp_path}"), "is not a run folder")


def test_finished_diffusion_training_is_continued_by_a_longer_duration(train, dataset, tmp_path):
    assert train(dataset, "--duration=0.0002").status == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert train(dataset, f"--resume={run}", "--duration=0.0004").status == 0
    assert read_run(run)["status"] == "finished" and read_log(run)[-1]["kimg"] >= 0.4
    for duration in ("0.0004", "0.0001"):
        refused = train(dataset, f"--resume={run}", f"--duration={duration}")
        check_refusal(refused, "is finished", "A longer --duration would continue it")
    assert read_run(run)["status"] == "finished", "what is finished stays so"


def test_a_stopped_diffusion_training_says_how_to_go_on(train, command, dataset, tmp_path):
    run_epoch = DiffusionTrainer.run_epoch

    def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_epoch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTrainer, "run_epoch", stopped)
        outcome = train(dataset, "--name=a b")
    (run,) = (tmp_path / "runs").iterdir()
    check_refusal(outcome, f"Stopped by SIGTERM after epoch 1; the state is saved in '{run}'. Go on with: dydiff train -m ")
    words = shlex.split(outcome.errors.rpartition("Go on with: ")[2])
    assert words[-2:] == ["--resume", str(run)] and command(*words[1:]).status == 0
    assert read_run(run)["status"] == "finished"


def test_two_runs_in_one_folder(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refusal(train(dataset, f"--resume={run}"), "Another process is working in")
    assert train(dataset, f"--resume={run}").status == 0


def test_a_damaged_state_is_told_and_does_not_block_the_folder(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    state = run / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    for _ in range(2):
        check_refusal(train(dataset, f"--resume={run}"), "state.safetensors", "damaged")
    state.unlink()
    assert train(dataset, f"--resume={run}").status == 0, "without its state a run starts over"


def test_foreign_files_among_the_runs_are_passed_over(run_stage, dataset, tmp_path):
    for name, text in {"a": "[1, 2]", "b": '{"id": 3}', "c": "nonsense"}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(text)
    assert run_stage("reward", dataset, "--device=cpu", "--resume").status == 0


def test_run_folder_tells_what_was_run(run_stage, dataset, tmp_path):
    described = "--set=meta_data.description=a small test"
    assert run_stage("reward", dataset, "--device=cpu", described, "--set=model_params.lr=2e-3").status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = read_run(run)
    assert record["status"] == "finished" and record["description"] == "a small test" and record["dataset"] == DATASET
    assert "lr: 0.002" in (run / "settings.yaml").read_text()
    assert [line["epoch"] for line in read_log(run)] == list(range(1, 11))
    # The description identifies nothing: with another one the run is still found.
    outcome = run_stage("reward", dataset, "--device=cpu", "--resume", "--set=model_params.lr=2e-3")
    assert "Already finished" in outcome.output and "Nothing is left to do" in outcome.output and "|" not in outcome.errors
    assert len(list((tmp_path / "runs").iterdir())) == 1
