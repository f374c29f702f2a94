"""Data of environments that are not dydiff's: made by gymnasium by their id, from anybody's module, or without any simulator."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import tiny

from dydiff.data import load_dataset
from dydiff.environments import choose_environment, environment_spec
from dydiff.environments.own import own_spec
from dydiff.environments.simulate import roll_out_simulator
from dydiff.environments.terminal import terminal_function
from dydiff.errors import DydiffError
from dydiff.problem import load_problem

EXAMPLE = Path(__file__).parents[1] / "examples" / "point.py"
OWN = ["--device=cpu", "--set=env_specs.env_name=point_world:Point-v0"]
MORE = """

class Picture(Point):
    observation_space = gymnasium.spaces.Box(0, 1, (4, 4), np.float32)

class Endless(Point):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)

gymnasium.register("Picture-v0", Picture)
gymnasium.register("Endless-v0", Endless)

def done_in_rows(observation):
    return observation[:, 0].abs() > 1

def fails(observation):
    return observation[..., 7] > 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the example in it, and more, as a module of one's own that nothing has imported."""
    (tmp_path / "point_world.py").write_text(EXAMPLE.read_text().partition("\n\nif __name__")[0] + MORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    own_spec.cache_clear()
    yield tmp_path
    sys.modules.pop("point_world", None)
    for name in ("Point-v0", "Picture-v0", "Endless-v0"):
        gymnasium.registry.pop(name, None)
    importlib.invalidate_caches()


def write_data(path, rows=400):
    """The example's data; every row with its next observation."""
    own_spec("point_world:Point-v0")  # imports it
    sys.modules["point_world"].write_dataset(path, rows)
    return path


@pytest.fixture
def train_models(folder, command, run_stage):
    """Trains the three models that rollouts need under folder/runs."""

    def train(data, *options):
        assert command("train", "-m", data, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={folder / 'runs'}").status == 0
        for stage in ("dynamics", "reward"):
            assert run_stage(stage, data, *(options or OWN)).status == 0

    return train


def test_a_module_of_ones_own_goes_through_every_stage(folder, train_models, command, run_stage):
    data = write_data(folder / "point.npz", rows=4000)
    train_models(data)
    unknown = run_stage("td3_bc", data, *OWN)
    assert unknown.status != 0 and "When episodes of point_world:Point-v0 end is not known" in unknown.errors
    done = run_stage(
        "td3_bc",
        data,
        *OWN,
        "--set=env_specs.terminal_function=point_world:is_done",
        "--set=rl_trainer_params.evaluation_worker=true",
        "--set=rl_trainer_params.num_epochs=2",
    )
    assert done.status == 0, done.errors
    dataset = load_dataset(str(data))
    terminals, timeouts = dataset.terminals[:-1].sum(), dataset.timeouts[:-1].sum()
    assert f"ends 0 of the dataset's {3999 - terminals - timeouts:,} transitions" in done.errors
    assert f"misses 0 of its {terminals:,} terminals" in done.errors and terminals > 5
    (run,) = (folder / "runs").glob("*td3_bc*")
    assert json.loads((run / "run.json").read_text())["simulator"].startswith("gymnasium ")
    assert "evaluation/return" in (run / "log.jsonl").read_text()
    report = command("report", f"--outdir={folder / 'runs'}", f"--dataset={data}", "--device=cpu")
    assert report.status == 0, report.errors
    assert "state error" in report.output and "at most 5 steps" in report.output


def test_a_function_of_ones_own_that_does_not_fit_is_refused_at_the_start(folder, train_models, run_stage):
    data = write_data(folder / "point.npz", rows=200)
    train_models(data)
    for chosen, told in (
        ("point_world:done_in_rows", "observation[..., 0]"),
        ("point_world:fails", "failed on the dataset: IndexError"),
        ("point_world:found", "cannot be imported: AttributeError"),
        ("pointworld:is_done", "cannot be imported: ModuleNotFoundError"),
        ("lost", "must have the form module:name, and is 'lost'"),
    ):
        refused = run_stage("td3_bc", data, *OWN, f"--set=env_specs.terminal_function={chosen}")
        assert refused.status != 0 and told in refused.errors, refused.errors


def test_data_without_a_simulator_train_without_evaluation(folder, train_models, command, run_stage):
    data = write_data(folder / "point.npz", rows=200)
    with np.load(data) as file:
        arrays = {**file, "terminals": np.zeros(200, bool), "actions": file["actions"] / 2}
    np.savez(data, **arrays)
    unnamed = run_stage("dynamics", data)
    assert unnamed.status != 0 and "'none' where there is no simulator" in unnamed.errors
    none = ["--device=cpu", "--set=env_specs.env_name=none"]
    train_models(data, *none)
    done = run_stage("td3_bc", data, *none)
    assert done.status == 0, done.errors
    assert "No simulator: this run trains without evaluation" in done.errors
    report = command("report", f"--outdir={folder / 'runs'}", f"--dataset={data}", "--device=cpu")
    assert report.status != 0 and "No finished and evaluated policy run" in report.errors


def test_a_registered_id_may_stand_in_the_file_and_a_module_may_not(folder, command):
    data = write_data(folder / "hopper-of-my-own.npz", rows=100)
    problem = load_problem(str(data), "point_world:Point-v0")  # whatever the file's name says
    assert problem.spec.observation_dim == 2 and problem.spec.max_episode_steps == 100
    in_policy_space = problem.policy_transitions("cpu").action
    np.testing.assert_allclose(in_policy_space, problem.transitions.action / 2, rtol=1e-6)
    with np.load(data) as file:
        arrays = dict(file)
    np.savez(folder / "stated.npz", **arrays, **{"metadata/environment": "Point-v0"})
    assert load_problem("stated.npz").spec.gym_id == "Point-v0"
    sys.modules.pop("point_world")
    np.savez(folder / "trap.npz", **arrays, **{"metadata/environment": "point_world:Point-v0"})
    with pytest.raises(DydiffError, match="would run code of that module"):
        load_problem("trap.npz")
    for action in ("validate", "inspect", "check-dynamics"):
        command("data", action, "trap.npz")
    assert "point_world" not in sys.modules


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("CartPole-v1", r"actions of CartPole-v1 must be vectors.*Discrete\(2\)"),
        ("point_world:Picture-v0", "observations of point_world:Picture-v0 must be vectors.*FlattenObservation"),
        ("point_world:Endless-v0", "finite bounds"),
        ("point_world:Line-v0", "gymnasium cannot make .*NameNotFound"),
        ("pointworld:Point-v0", "ModuleNotFoundError"),
        ("Pont-v7", "is unknown.*gymnasium id.*'none' stands for data without a simulator"),
        ("none", "No simulator: models and policies"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(folder, name, told):
    with pytest.raises(DydiffError, match=told):
        environment_spec(name)


def test_known_names_keep_their_meaning(folder):
    assert choose_environment("Hopper-v4") == "hopper" and choose_environment("Pendulum-v1") == "Pendulum-v1"
    spec = environment_spec("Pendulum-v1")
    assert (spec.observation_dim, spec.action_high, spec.max_episode_steps) == (3, (2.0,), 200)
    with pytest.raises(DydiffError, match="No simulator 'gymnasium-v4' of Pendulum-v1"):
        environment_spec("Pendulum-v1", "gymnasium-v4")
    with pytest.raises(DydiffError, match="When episodes of Pendulum-v1 end is not known"):
        terminal_function("Pendulum-v1")
    with pytest.raises(DydiffError, match="cannot be put into recorded states"):
        roll_out_simulator(spec, np.zeros((1, 0)), np.zeros((1, 0)), 3, act=lambda observation: observation[:, :1])


def test_an_environment_that_takes_an_observation_is_compared_step_by_step(folder):
    spec = environment_spec("point_world:Point-v0")
    start, action = np.array([[0.1, -0.2], [0.95, 0.8]]), np.full((2, 3, 1), 0.5, np.float32)
    made = roll_out_simulator(spec, start, np.zeros((2, 0)), 3, actions=action)
    expected = [start]
    for _ in range(2):
        position, velocity = expected[-1].T
        expected.append(np.stack([position + velocity / 10, velocity + 0.5 / 10], axis=1))
    np.testing.assert_allclose(made.observation, np.stack(expected, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(made.terminal, [[False, False, False], [True, True, True]])
