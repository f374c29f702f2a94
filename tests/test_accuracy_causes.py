"""What limits rollouts: later actions as evidence, and training with the simulator in the models' place; on tiny runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import action_evidence  # noqa: E402 - the folder is not a package, and must be found first
import perfect_dynamics  # noqa: E402

from dydiff.agents.td3_bc import TD3BC  # noqa: E402
from dydiff.cli import main  # noqa: E402
from dydiff.collecting.collect import collect  # noqa: E402
from dydiff.data import Transitions  # noqa: E402
from dydiff.reports.policy_runs import load_subject  # noqa: E402

KINDS = ["recorded", "perturbed 0.1", "perturbed 0.3", "other"]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> tuple[Path, str]:
    """A folder of tiny runs on hopper, a DyDiff policy among them, and their dataset."""
    root = tmp_path_factory.mktemp("hopper")
    dataset = str(root / "hopper-random-local.hdf5")
    collect("hopper-random-local", steps=600, seed=0, path=dataset, progress=False)
    assert main(["train", "-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={root}/runs"]) == 0
    for stage in ("dynamics", "reward", "td3_bc"):
        file = tiny.write_experiment(root / f"{stage}.yaml", stage, dataset)
        assert main(["run", "-e", str(file), "--device=cpu", f"--outdir={root}/runs"]) == 0
    return root / "runs", dataset


def test_only_later_actions_are_replaced():
    action = torch.rand(5, 8, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    replaced = action_evidence.replace_later(action, 3, seed=0)
    assert list(replaced) == KINDS
    assert torch.equal(replaced.pop("recorded"), action)
    for later in replaced.values():
        assert torch.equal(later[:, :3], action[:, :3]) and (later[:, 3:] != action[:, 3:]).float().mean() > 0.9
        assert later.abs().max() <= 1
    assert torch.equal(replaced["other"][1:, 3:], action[:-1, 3:])


def test_a_causal_model_passes_and_another_is_found_out(hopper, monkeypatch):
    subject = load_subject(*hopper, "cpu")

    def sampler_that_sees(actions_of_row):
        def sample(denoiser, shape, draw, first, actions, **settings):
            seen = torch.stack([actions_of_row(actions, row) for row in range(shape[1])], dim=1)  # [B, H]
            return 0.01 * seen[..., None].expand(shape)

        return sample

    monkeypatch.setattr(action_evidence, "sample_edm", sampler_that_sees(lambda actions, row: actions[:, :row].sum(dim=(1, 2))))
    causal = action_evidence.measure(subject, 16, [1, 4], seed=0)
    assert [line["later"] for line in causal] == KINDS * 2
    for kept in (1, 4):
        means = [line["error"]["mean"] for line in causal if line["kept"] == kept]
        assert len(set(means)) == 1 and means[0] > 0
    monkeypatch.setattr(action_evidence, "sample_edm", sampler_that_sees(lambda actions, row: actions.sum(dim=(1, 2))))
    acausal = action_evidence.measure(subject, 16, [4], seed=0)
    assert len({line["error"]["mean"] for line in acausal}) == 4


def test_commands(hopper, tmp_path, capsys):
    runs, dataset = hopper
    file = tmp_path / "evidence.json"
    arguments = [f"--outdir={runs}", f"--dataset={dataset}", "--starts=8", "--device=cpu"]
    assert action_evidence.main([*arguments, "--kept=1,3", f"--json={file}"]) == 0
    assert len(json.loads(file.read_text())["lines"]) == 8 and "rows 1 .. 3" in capsys.readouterr().out
    assert action_evidence.main([*arguments, "--kept=8"]) == 1
    assert "--kept must lie between 1 and 7" in capsys.readouterr().err

    (policy,) = (run for run in runs.iterdir() if (run / "agent.safetensors").exists())
    file = tmp_path / "perfect.json"
    for more in ([], ["--true-reward"], ["--clone-real", "--set=rl_trainer_params.keep_condition.threshold=1"]):
        assert perfect_dynamics.main([str(policy), f"--json={file}", *more]) == 0
        recorded, simulated = json.loads(file.read_text())["lines"]
        assert len(recorded["curves"][0]) == len(simulated["curves"][0]) >= 1
        assert simulated["last"]["mean"] == simulated["curves"][0][-1]
    assert simulated["rollouts"] == "simulator, data's actions cloned, rl_trainer_params.keep_condition.threshold=1"
    assert perfect_dynamics.main([str(policy), f"--json={file}", "--seeds=3,4"]) == 0
    _, simulated = json.loads(file.read_text())["lines"]
    assert len(simulated["curves"]) == 2 and simulated["curves"][0] != simulated["curves"][1]
    assert perfect_dynamics.main([str(policy), "--set=rl_trainer_params.num_epoch=1"]) == 1
    assert "did you mean 'num_epochs'" in capsys.readouterr().err
    assert perfect_dynamics.main([str(runs / "nothing")]) == 1
    assert "is no run of a policy. Name run folders" in capsys.readouterr().err
    for wrong in ("nothing", "00000-"):  # a run of another kind, too; told before the first run trains
        other = next((folder for folder in runs.iterdir() if folder.name.startswith(wrong)), runs / wrong)
        assert perfect_dynamics.main([str(policy), str(other)]) == 1
        output = capsys.readouterr()
        assert f"'{other}' is no run of a policy" in output.err and not output.out


def test_cloning_of_real_actions_alone():
    agent = TD3BC(4, 2, (8,), generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    noise = agent.draw_noise(6, draws)
    batch = Transitions(*(torch.randn(6, *width, generator=draws) for width in ((4,), (2,), (), (4,), ())))
    moved = batch._replace(action=torch.cat([batch.action[:4], torch.zeros(2, 2)]))  # in the synthetic rows
    assert agent.policy_loss(batch, noise)[0] != agent.policy_loss(moved, noise)[0]
    (value, cloning), (_, real) = agent.policy_loss(batch, noise), agent.policy_loss(
        Transitions(*(field[:4] for field in batch)), noise._replace(policy_action=noise.policy_action[:4])
    )
    perfect_dynamics.clone_real_actions(agent, num_real=4)
    assert torch.equal(agent.policy_loss(batch, noise)[0], agent.policy_loss(moved, noise)[0])
    torch.testing.assert_close(agent.policy_loss(batch, noise)[0], value - cloning + real)


def test_simulator_in_the_place_of_the_engine(hopper):
    problem = load_subject(*hopper, "cpu").problem
    simulator, spaces = perfect_dynamics.Simulator(problem, 6), problem.spaces
    start = problem.policy_transitions("cpu").observation[:5]

    def policy(observation: torch.Tensor) -> torch.Tensor:
        return torch.tanh(observation[:, :3])

    actor = SimpleNamespace(act=lambda observation, generator: policy(observation))
    observation, action = simulator.roll_out(actor, start, torch.Generator())
    torch.testing.assert_close(observation[:, 0], start, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(action, policy(observation.flatten(0, 1)).view_as(action), rtol=1e-5, atol=1e-5)
    # Hopper earns its forward speed, one for living, and pays for effort: never more than the speed and one.
    reward = simulator.reward(observation[:2], action[:2])
    assert reward.shape == (2, 6)
    speed = spaces.observation_policy_to_raw(observation)[:2, :, 5].abs()
    assert (reward < speed + 2).all() and (reward > -3).all()
