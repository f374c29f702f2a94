"""The report: its numbers on cases with known answers, and the whole of it on tiny runs of two environments."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dydiff.collect import collect
from dydiff.comparison import Comparison
from dydiff.config import Constants, RLTrainerParams
from dydiff.data import Limits, Spaces, ZScore
from dydiff.environments import environment_spec
from dydiff.report import PolicyRun, format_table, group_runs

PNG = b"\x89PNG\r\n"


@pytest.fixture
def train_policy(command, tmp_path):
    """Trains a tiny policy in a folder, with settings overridden."""

    def train(root: Path, dataset: str, stage: str, *overrides: str) -> None:
        file = tiny.write_experiment(tmp_path / "policy.yaml", stage, dataset)
        changes = [word for text in overrides for word in ("--set", text)]
        outcome = command("run", "-e", file, "--device=cpu", f"--outdir={root}", *changes)
        assert outcome.status == 0, outcome.errors

    return train


def make_report(command, root: Path, dataset: str) -> tuple[str, dict]:
    outcome = command("report", f"--outdir={root}", f"--dataset={dataset}", "--starts=6", "--device=cpu")
    assert outcome.status == 0, outcome.errors
    return outcome.output, json.loads((root / "report" / "report.json").read_text())


def test_maze(command, train_policy, trained, dataset, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    for overrides in (["seed=0"], ["seed=1"], ["seed=1"], ["rl_trainer_params.real_ratio=1"]):  # seed 1 twice: a repetition
        train_policy(root, dataset, "td3_bc", *overrides)
    output, record = make_report(command, root, dataset)

    for name in ("rollout_error.png", "maze_rollouts.png", "learning_curve.png"):
        assert (root / "report" / name).read_bytes().startswith(PNG)
        assert str(root / "report" / name) in output
    assert "MuJoCo" in output and "position error (m)" in output and "3,000 rows" in output

    assert record["horizon"] == 8 and record["starts"] == 6 and record["alive"] == [6] * 8
    for by_model in record["rollout_error"].values():
        assert list(by_model) == ["no motion", "single-step", "DyDiff"]
        for values in by_model.values():
            assert len(values["mean"]) == len(values["standard_error"]) == 8
            assert values["mean"][0] < 1e-5 and np.isfinite(values["mean"]).all()  # all start where the simulator does
    dydiff, base = sorted(record["scores"], key=lambda score: not score["dydiff"])
    assert (dydiff["variant"], dydiff["seeds"]) == ("DyDiff + TD3+BC", [0, 1])
    assert (base["variant"], base["seeds"]) == ("TD3+BC", [0])
    log = [json.loads(line) for line in (Path(base["folders"][0]) / "log.jsonl").read_text().splitlines()]
    assert base["last"]["mean"] == log[-1]["evaluation/return"]
    assert base["best"]["mean"] == log[-1]["evaluation/best_return"]
    assert base["updates"] == [[4 * epoch for epoch in range(1, 9)]]
    assert base["last"]["normalized_score"] is None, "a local dataset has no reference scores"
    assert "score" not in output.split("variant")[1].splitlines()[0]

    again, _ = make_report(command, root, dataset)
    assert again == output, "the same seed must give the same report"


def test_environment_without_a_maze(command, train_policy, tmp_path):
    dataset, root = str(tmp_path / "hopper-random-local.hdf5"), tmp_path / "runs"
    collect("hopper-random-local", steps=400, seed=0, path=dataset, progress=False)
    options = ["-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={root}"]
    assert command("train", *options).status == 0
    for stage in ("dynamics", "reward", "diffusion_ql"):
        train_policy(root, dataset, stage)
    output, record = make_report(command, root, dataset)
    assert (root / "report" / "rollouts.png").read_bytes().startswith(PNG)
    assert list(record["rollout_error"]) == ["state"] and "position error" not in output
    assert record["alive"][0] == 6 and record["alive"] == sorted(record["alive"], reverse=True)
    assert record["behaviour_return"] is None, "episodes that end early have no return per step"
    assert record["scores"][0]["variant"] == "DyDiff + Diffusion-QL"


def test_errors(command, train_policy, trained, dataset, tmp_path):
    outcome = command("report", f"--outdir={trained}", f"--dataset={dataset}")
    assert outcome.status == 1 and "No finished and evaluated policy run" in outcome.errors and "dydiff run" in outcome.errors
    root = tmp_path / "runs"
    train_policy(root, dataset, "td3_bc", "rl_trainer_params.real_ratio=1")
    outcome = command("report", f"--outdir={root}", f"--dataset={dataset}")
    assert outcome.status == 1 and "No finished diffusion model run" in outcome.errors


def test_known_errors_and_ended_episodes():
    simulated = np.zeros((2, 3, 4), np.float32)
    modelled = np.zeros((2, 3, 4), np.float32)
    modelled[0, 1] = [3, 4, 0, 0]
    modelled[1, 1:] = 100  # after this start's episode has ended
    alive = np.array([[True, True, True], [True, False, False]])
    limits = Limits(-torch.ones(6), torch.ones(6))
    spaces = Spaces(limits, ZScore(torch.zeros(4), torch.tensor([1.0, 2.0, 1.0, 1.0])), -torch.ones(2), torch.ones(2))
    errors = Comparison(simulated, alive, {"model": modelled}).errors(environment_spec("maze2d-umaze"), spaces)
    assert errors["position"]["model"]["mean"] == [0, 5, 0]
    np.testing.assert_allclose(errors["state"]["model"]["mean"], [0, np.sqrt((3**2 + 2**2) / 4), 0], rtol=1e-6)
    assert errors["state"]["model"]["standard_error"] == [0, None, None]


def test_variants_are_told_apart():
    def run(folder: str, experiment: str, ratio: float, seed: int, alpha: float) -> PolicyRun:
        constants = Constants("data", seed, RLTrainerParams(real_ratio=ratio))
        stored = {"dataset_name": "data", "seed": seed, "real_ratio": ratio, "alpha": alpha}
        settings = {"experiment": experiment, "stage": "td3_bc", "variables": {"seed": seed, "td3_bc_params.alpha": alpha}}
        return PolicyRun(Path(folder), {**settings, "constants": stored}, constants, "simulator", [1], [1.0], 1)

    short = group_runs([run("0", "a", 0.6, 0, 1), run("1", "a", 0.6, 1, 1), run("2", "a", 1, 0, 1)])
    assert [(variant.name, list(variant.runs)) for variant in short] == [("DyDiff + TD3+BC", [0, 1]), ("TD3+BC", [0])]
    longer = group_runs([run("0", "a", 0.6, 0, 1), run("1", "b", 0.6, 0, 2)])
    assert [variant.name for variant in longer] == ["DyDiff + TD3+BC (alpha=1)", "DyDiff + TD3+BC (alpha=2)"]


def test_table():
    assert format_table([["a", "long"], ["word", "1"]]) == "  a     long\n  word     1"
