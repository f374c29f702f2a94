"""Rollout accuracy: a perfect model has no error, recorded actions are played in their order, and the command on tiny runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import rollout_accuracy  # noqa: E402 - the folder is not a package, and must be found first
from probe_policies import clone_behaviour, distance_from_data, perturb  # noqa: E402

from dydiff.cli import main  # noqa: E402
from dydiff.collecting.collect import collect  # noqa: E402
from dydiff.data import Transitions  # noqa: E402
from dydiff.environments.simulate import roll_out_simulator, state_from_observation  # noqa: E402
from dydiff.errors import DydiffError  # noqa: E402
from dydiff.reports.comparison import RecordedActions, compare_models, draw_cases  # noqa: E402
from dydiff.reports.deviation import TRUE_STATES  # noqa: E402
from dydiff.reports.policy_runs import load_subject  # noqa: E402
from dydiff.rollout import Trajectory  # noqa: E402

ONE_STEP_ERROR = 1e-3


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> tuple[Path, str]:
    """A folder of tiny runs on hopper, with a diffusion model that takes no actions beside it; and their dataset."""
    root = tmp_path_factory.mktemp("hopper")
    dataset = str(root / "hopper-random-local.hdf5")
    collect("hopper-random-local", steps=600, seed=0, path=dataset, progress=False)
    options = ["-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN]
    assert main(["train", *options, f"--outdir={root}/runs"]) == 0
    assert main(["train", *options, f"--outdir={root}/free", "--cond_on_action=False"]) == 0
    for stage in ("dynamics", "reward", "td3_bc"):
        file = tiny.write_experiment(root / f"{stage}.yaml", stage, dataset)
        assert main(["run", "-e", str(file), "--device=cpu", f"--outdir={root}/runs"]) == 0
    return root, dataset


def test_a_perfect_model_has_no_error(hopper):
    root, dataset = hopper
    subject = load_subject(root / "runs", dataset, "cpu")
    problem, spaces = subject.problem, subject.problem.spaces
    horizon = subject.rollouts.engine.horizon

    def simulator(policy, start):
        def act(raw):
            return spaces.action_policy_to_raw(policy(spaces.observation_raw_to_policy(torch.as_tensor(raw)))).numpy()

        state = state_from_observation(problem.spec, spaces.observation_policy_to_raw(start).numpy())
        rows = roll_out_simulator(problem.spec, *state, horizon, act)
        action = spaces.action_raw_to_policy(torch.as_tensor(rows.action))
        return Trajectory(spaces.observation_raw_to_policy(torch.as_tensor(rows.observation)), action)

    def shifted(policy, start):
        """Plays the actions one row too late."""
        policy.step = policy.action.shape[1] - 1
        return simulator(policy, start)

    cases = draw_cases(problem, horizon, 12, seed=0)
    models = {"simulator": simulator, "shifted": shifted}
    recorded = compare_models(models, subject.rollouts, problem, cases.start, None, cases)
    errors = recorded.errors(recorded.deviations(problem.spec, spaces, with_steps=True))
    assert max(errors["state"]["simulator"]["mean"]) < ONE_STEP_ERROR < 0.05 < max(errors["state"]["shifted"]["mean"])
    # Late actions lead elsewhere, but by true steps from row to row. (Resetting the solver at every row costs a little.)
    assert max(errors["step"]["simulator"]["mean"]) < ONE_STEP_ERROR
    assert TRUE_STATES not in errors["state"]
    np.testing.assert_allclose(errors["reward"]["simulator"]["mean"], errors["reward"][TRUE_STATES]["mean"], rtol=1e-3)
    # The terminal function ends episodes where the simulator does.
    assert recorded.endings()["simulator"]["differs"] == recorded.endings()[TRUE_STATES]["differs"]
    assert recorded.endings()["simulator"]["differs"]["mean"] == 0 and recorded.simulated.terminal.any()

    closed = compare_models({"simulator": simulator}, subject.rollouts, problem, cases.start, subject.policy.agent.act)
    assert max(closed.errors(closed.deviations(problem.spec, spaces))["state"]["simulator"]["mean"]) < ONE_STEP_ERROR
    assert closed.known.all()


def test_cases_are_windows_of_the_data(hopper):
    subject = load_subject(hopper[0] / "runs", hopper[1], "cpu")
    data = subject.problem.dataset
    cases = draw_cases(subject.problem, 30, 400, seed=0)  # longer than most episodes of random actions
    ended = False
    for start, action, known in zip(cases.start, cases.action, cases.known, strict=True):
        (row,) = np.flatnonzero((data.observations == start).all(axis=1))
        length = 30
        for step in range(30):
            if data.terminals[row + step] or data.timeouts[row + step]:
                length = step + 1
                break
        np.testing.assert_array_equal(action[:length], data.actions[row : row + length])
        assert (action[length:] == action[length - 1]).all()
        over = data.terminals[row + length - 1]
        np.testing.assert_array_equal(known, (np.arange(30) < length) | over)
        ended |= bool(over and length < 30)
    assert ended


def test_recorded_actions_are_played_in_their_order():
    action = torch.arange(2 * 3).reshape(2, 3, 1).float()
    policy = RecordedActions(action)
    for _ in range(2):
        for step in range(3):
            assert torch.equal(policy(torch.zeros(2, 4)), action[:, step])
        assert torch.equal(policy(torch.zeros(6, 4)).unflatten(0, (2, 3)), action)
    with pytest.raises(DydiffError, match="2 starts"):
        policy(torch.zeros(1, 4))


def test_probe_policies():
    observation = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))

    def policy(observation):
        return torch.tanh(0.3 * observation[:, :2])

    action = policy(observation)
    data = Transitions(observation, action, *[torch.zeros(2000)] * 3)
    assert torch.equal(perturb(policy, 5, 2, 0.0, seed=0)(observation), action)
    moved = perturb(policy, 5, 2, 0.1, seed=0)
    assert torch.equal(moved(observation), moved(observation))
    assert distance_from_data(moved, data, 1000, seed=0) == pytest.approx(0.1, rel=0.25)
    assert (moved(observation + 1e-3) - moved(observation)).abs().max() < 1e-2  # smooth
    clone, error = clone_behaviour(data, 300, seed=0)
    assert error < 0.01 < float(action.square().mean())
    assert distance_from_data(clone, data, 1000, seed=0) < 0.1


def measure(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = rollout_accuracy.main([*map(str, arguments), "--device=cpu", "--starts=5", "--clone-updates=5"])
    return status, *capsys.readouterr()


def test_command(hopper, tmp_path, capsys):
    root, dataset = hopper
    options = [f"--outdir={root}/runs", f"--dataset={dataset}", "--iterations=1,3"]
    (free,) = (root / "free").iterdir()
    status, output, errors = measure(capsys, *options, f"--uninjected={free}", f"--json={tmp_path}/j", f"--plot={tmp_path}/p.png")
    assert status == 0, errors
    record = json.loads((tmp_path / "j").read_text())
    assert str(root) not in json.dumps(record), "a report can be published: no path of this machine is in it"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert list(record["policies"]) == ["recorded", "clone", "TD3+BC", "perturbed"]
    models = ["no motion", "single-step", "uninjected", "DyDiff 1", "DyDiff 3", "DyDiff fast", "true states"]
    for policy in record["policies"].values():
        assert list(policy["errors"]) == ["state", "step", "reward", "return", "ending"]
        assert list(policy["errors"]["reward"]) == models and list(policy["endings"]) == models
        assert all(len(values["mean"]) == record["horizon"] for by in policy["errors"].values() for values in by.values())
        assert policy["errors"]["state"]["uninjected"]["mean"][0] < ONE_STEP_ERROR  # it is given the start
        assert policy["endings"]["true states"]["differs"]["mean"] == 0
    free_rollouts = [policy["returns"]["uninjected"] for policy in record["policies"].values()]
    assert len({json.dumps(each) for each in free_rollouts}) > 1, "the simulator follows the policies"
    assert "not measured" not in output and "MuJoCo" in output

    assert measure(capsys, *options, f"--uninjected={free}")[1] == output, "the same seed must give the same numbers"
    (injected,) = (path for path in (root / "runs").iterdir() if "MLP" in path.name)
    status, _, errors = measure(capsys, *options, f"--uninjected={injected}")
    assert status == 1 and "--cond_on_action False" in errors


def test_command_in_a_maze(command, trained, dataset, tmp_path, capsys):
    """Where no episode ends early, nothing is said of endings; without a model for it, uninjected diffusion is not measured."""
    shutil.copytree(trained, tmp_path / "runs")
    options = [f"--outdir={tmp_path}/runs", f"--dataset={dataset}", "--iterations=1"]
    status, _, errors = measure(capsys, *options)
    assert status == 1 and "No finished and evaluated policy run" in errors
    file = tiny.write_experiment(tmp_path / "policy.yaml", "td3_bc", dataset)
    assert command("run", "-e", file, "--device=cpu", f"--outdir={tmp_path}/runs").status == 0
    status, output, errors = measure(capsys, *options, f"--json={tmp_path}/record.json")
    assert status == 0, errors
    assert "not measured" in output and "position error (m)" in output and "goes on" not in output
    record = json.loads((tmp_path / "record.json").read_text())
    assert all("ending" not in policy["errors"] and "endings" not in policy for policy in record["policies"].values())
