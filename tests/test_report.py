"""The report: its numbers on cases with known answers, and the whole of it on tiny runs of two environments."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dydiff.collecting.collect import collect
from dydiff.config import Constants, KeepCondition, RLTrainerParams, SamplerKwargs, TD3BCParams
from dydiff.data import Limits, Spaces, ZScore, load_dataset
from dydiff.environments import environment_spec
from dydiff.environments.simulate import SimulatedTrajectories
from dydiff.errors import DydiffError
from dydiff.reports import plots
from dydiff.reports.deviation import Comparison
from dydiff.reports.policy_runs import PolicyRun, group_runs
from dydiff.reports.tables import format_table

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
    data = load_dataset(dataset)
    ends = np.flatnonzero(data.terminals | data.timeouts) + 1
    episodes = np.split(data.rewards[: ends[-1]], ends[:-1])
    assert record["behaviour_return"] == pytest.approx(np.mean([episode.sum() for episode in episodes]), rel=1e-5)
    assert record["scores"][0]["variant"] == "DyDiff + Diffusion-QL"


def test_errors(command, train_policy, trained, dataset, tmp_path):
    outcome = command("report", f"--outdir={trained}", f"--dataset={dataset}")
    assert outcome.status == 1 and "No finished and evaluated policy run" in outcome.errors and "dydiff run" in outcome.errors
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    train_policy(root, dataset, "td3_bc")
    for model in root.glob("*/model.safetensors"):
        model.unlink()
    outcome = command("report", f"--outdir={root}", f"--dataset={dataset}")
    assert outcome.status == 1 and "model.safetensors', with which the run began; it is not there" in outcome.errors
    assert not (root / "report").exists()


def test_base_algorithms_need_no_models(command, train_policy, dataset, tmp_path):
    train_policy(tmp_path, dataset, "td3_bc", "rl_trainer_params.real_ratio=1")
    outcome = command("report", f"--outdir={tmp_path}", f"--dataset={dataset}")
    assert outcome.status == 0 and "No finished diffusion model run" in outcome.errors
    assert "TD3+BC" in outcome.output and "Rollout error" not in outcome.output
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"learning_curve.png", "report.json"}
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [score["variant"] for score in record["scores"]] == ["TD3+BC"] and "rollout_error" not in record


def test_known_errors_and_ended_episodes():
    def trajectories(reward: list, terminal: list) -> SimulatedTrajectories:
        shape = (2, 3)
        return SimulatedTrajectories(
            np.zeros((*shape, 4), np.float32), np.zeros((*shape, 2), np.float32), np.array(reward, float), np.array(terminal, bool)
        )

    truth = trajectories([[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [1, 0, 0]])
    model = trajectories([[2, 1, 0], [1, 5, 5]], [[0, 0, 0], [0, 1, 0]])
    model.observation[0, 1] = [3, 4, 0, 0]
    model.observation[1, 1:] = 100  # after this start's episode has ended
    limits = Limits(-torch.ones(6), torch.ones(6))
    spaces = Spaces(limits, ZScore(torch.zeros(4), torch.tensor([1.0, 2.0, 1.0, 1.0])), -torch.ones(2), torch.ones(2))
    comparison = Comparison(truth, {"model": model}, np.ones((2, 3), bool))
    deviations = comparison.deviations(environment_spec("maze2d-umaze"), spaces)
    errors = comparison.errors(deviations)
    assert errors["position"]["model"]["mean"] == [0, 5, 0]
    np.testing.assert_allclose(errors["state"]["model"]["mean"], [0, np.sqrt((3**2 + 2**2) / 4), 0], rtol=1e-6)
    assert errors["state"]["model"]["standard_error"] == [0, None, None]
    averages = comparison.averages(deviations)
    assert averages["position"]["model"].tolist() == [2.5, 0]  # the second start's episode has but its first row
    assert averages["return"]["model"].tolist() == [0.5, 5]
    assert errors["reward"]["model"]["mean"] == [0.5, 0, 1]  # while the simulator's episode goes on
    # Sums of 1, 2, 3 and 2, 3, 3 at the first start; of 1, 1, 1 and 1, 6, 6 at the second, each up to its own end.
    assert errors["return"]["model"]["mean"] == [0.5, 3, 2.5]
    assert errors["ending"]["model"]["mean"] == [0, 0.5, 0]
    assert comparison.endings() == {"model": {"differs": {"mean": 0.5, "standard_error": 0.5}, "later": comparison_mean(0.5, 0.5)}}
    assert comparison.returns()["model"] == comparison_mean(2.5, 2.5)
    masked = Comparison(truth, {"model": model}, np.array([[True, True, False], [True, True, True]]))
    assert masked.errors(deviations)["return"]["model"]["mean"] == [0.5, 3, 5]
    assert masked.returns()["model"] == comparison_mean(3, 2)


def comparison_mean(mean: float, standard_error: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": standard_error}


def make_run(folder: str, experiment: str, constants: Constants, variables: dict | None = None, simulator: str = "s") -> PolicyRun:
    settings = {"experiment": experiment, "stage": "td3_bc", "variables": variables or {}, "constants": asdict(constants)}
    return PolicyRun(Path(folder), settings, constants, simulator, [1], [1.0], 1, 0.0)


def describe_run(seed: int, filter_type: str = "softmax", alpha: float = 2.5, ratio: float = 0.6) -> Constants:
    trainer = RLTrainerParams(real_ratio=ratio, keep_condition=KeepCondition(filter_type))
    return Constants("data", seed, rl_trainer_params=trainer, td3_bc_params=TD3BCParams(alpha=alpha))


def names_of(*runs: PolicyRun) -> list[tuple[str, list[int]]]:
    return [(variant.name, list(variant.runs)) for variant in group_runs(runs)]


def test_variants_are_told_apart():
    ours, base = make_run("0", "a", describe_run(0)), make_run("2", "a", describe_run(0, ratio=1))
    other_seed, repeated = make_run("1", "a", describe_run(1)), make_run("9", "a", describe_run(0))
    assert names_of(ours, other_seed, base) == [("DyDiff + TD3+BC", [0, 1]), ("TD3+BC", [0])]
    assert group_runs([ours, other_seed, repeated])[0].runs[0] is repeated
    fast = make_run("6", "a", replace(describe_run(0), sampler_kwargs=SamplerKwargs(fast=True)))
    assert [name for name, _ in names_of(ours, fast)] == ["DyDiff + TD3+BC", "fast DyDiff + TD3+BC"]
    hardmax = make_run("3", "a", describe_run(0, "hardmax"))
    filters = ["DyDiff + TD3+BC (softmax)", "DyDiff + TD3+BC (hardmax)", "TD3+BC"]
    assert [name for name, _ in names_of(ours, hardmax, base)] == filters
    chosen = [make_run("8", "a", describe_run(0, alpha=alpha), {"seed": 0, "td3_bc_params.alpha": alpha}) for alpha in (1, 2)]
    assert [name for name, _ in names_of(*chosen)] == ["DyDiff + TD3+BC (alpha=1)", "DyDiff + TD3+BC (alpha=2)"]
    # Of two experiments: what their settings differ in, and the default goes without saying.
    later = make_run("4", "a", describe_run(0, alpha=1))
    assert [name for name, _ in names_of(ours, later, base)] == ["DyDiff + TD3+BC", "DyDiff + TD3+BC (alpha=1)", "TD3+BC"]
    elsewhere = make_run("5", "b", describe_run(0), simulator="another")
    assert [name for name, _ in names_of(ours, elsewhere)] == ["DyDiff + TD3+BC (a)", "DyDiff + TD3+BC (b)"]


def test_table():
    assert format_table([["a", "long"], ["word", "1"]]) == "  a     long\n  word     1"


def test_a_picture_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "rollout_error.png" / "folder").mkdir(parents=True)
    with pytest.raises(DydiffError, match="Cannot write '.*rollout_error.png'"):
        with plots._figure(tmp_path / "rollout_error.png", 1, 1, 3, 3):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["rollout_error.png"]
