"""An algorithm that is not dydiff's goes through everything that dydiff's own go through: examples/iql.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import test_seeds
import test_updates
import tiny
import torch
import yaml
from conftest import DATASET

from dydiff.agents import AGENTS, find_agent
from dydiff.errors import DydiffError
from dydiff.models import load_policy
from dydiff.runs import list_runs, read_log, read_settings
from dydiff.updates import Updates

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the example in it as a module of one's own that nothing has imported."""
    shutil.copy(EXAMPLES / "iql.py", tmp_path / "own_iql.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("own_iql", None)


@pytest.fixture
def iql(folder, monkeypatch):
    """The algorithm among dydiff's own, so that what is asked of those is asked of it."""
    monkeypatch.setitem(AGENTS, "iql", find_agent("own_iql:IQL"))
    monkeypatch.setitem(test_seeds.OPTIONS, "iql", ("iql", {}))


@pytest.mark.long  # compiling takes half a minute
@pytest.mark.parametrize("mode", test_updates.FAST_MODES)
def test_modes_agree(iql, mode):
    test_updates.test_modes_agree_step_by_step("iql", mode)


def test_seeds_update_together_as_alone(iql):
    test_seeds.test_seeds_update_together_as_alone("iql", "eager")


def test_an_update_that_mixes_seeds_is_told(iql, monkeypatch):
    class Mixed(AGENTS["iql"]):
        def apply_update(self, batch, noise, variant):
            return {name: loss.mean() for name, loss in super().apply_update(batch, noise, variant).items()}

    monkeypatch.setitem(AGENTS, "iql", Mixed)
    assert test_updates.make_updates("iql", "eager").run(2)["value_loss"] > 0
    together = Updates.together([test_seeds.make_updates("iql", seed, "eager") for seed in (0, 1)])
    with pytest.raises(DydiffError, match=r"Mixed logs value_loss with shape \[\], not one number for each of 2 seed"):
        together.run(2)


def test_it_learns_which_action_pays(iql):
    """Rewards are highest where the action is half the observation; most of the data does something else."""
    random = torch.Generator().manual_seed(0)
    observation, action = torch.randn(2000, 1, generator=random), 2 * torch.rand(2000, 1, generator=random) - 1
    reward = -10 * (action - observation.clamp(-1, 1) / 2).abs().squeeze(1)
    agent = AGENTS["iql"](1, 1, [32, 32], lr=3e-3, generator=random)
    batches = type(test_updates.transitions(1, 0))
    for _ in range(600):
        rows = torch.randint(2000, (64,), generator=random)
        batch = batches(observation[rows], action[rows], reward[rows], observation[rows], torch.ones(64))
        agent.update(batch, agent.draw_noise(64, random))
    wanted = torch.tensor([[-0.8], [0.0], [0.8]])
    torch.testing.assert_close(agent.act(wanted), wanted / 2, atol=0.15, rtol=0)


def write_experiment(path, **agent_params):
    arguments = {"hidden_dims": [8], "lr": "1e-3"}  # a number as YAML reads it without a point
    content = {
        "meta_data": {"exp_name": "mine"},
        "constants": {
            "dataset_name": DATASET,
            "agent_params": {"agent": "own_iql:IQL", "arguments": arguments} | agent_params,
            "rl_trainer_params": {**tiny.POLICY, "evaluation_worker": True, "num_epochs": 2},
            "sampler_kwargs": {"num_steps": 3},
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_class_of_ones_own_trains_resumes_and_is_reported(folder, dataset, trained, command):
    runs = shutil.copytree(trained, folder / "runs")
    run = ["run", "-e", write_experiment(folder / "mine.yaml"), "--device=cpu", f"--outdir={runs}"]
    for more in ([], ["--set=seeds=[1, 2]"], ["--resume", "--set=rl_trainer_params.num_epochs=3"]):
        done = command(*run, *more)
        assert done.status == 0, done.errors
    mine = sorted(folder for folder, _ in list_runs(runs) if "mine" in folder.name)
    assert len(mine) == 3 and [len(read_log(each)) for each in mine] == [3, 2, 2]
    assert read_settings(mine[0])["stage"] == "own" and read_log(mine[0])[-1]["train/value_loss"] > 0
    report = command("report", f"--outdir={runs}", f"--dataset={dataset}", "--device=cpu", "--starts=2")
    assert report.status == 0 and "DyDiff + IQL" in report.output, report.errors
    assert {score["algorithm"] for score in json.loads((runs / "report" / "report.json").read_text())["scores"]} == {"own"}

    file = mine[0] / "agent.safetensors"
    sys.modules.pop("own_iql")
    with pytest.raises(DydiffError, match=r"own_iql:IQL, whose class must be given: load_policy\(path, agent=...\)"):
        load_policy(file)
    assert "own_iql" not in sys.modules, "a checkpoint imports nothing"
    policy = load_policy(file, agent=find_agent("own_iql:IQL"))
    assert policy.agent.step == 12 and policy(np.zeros((3, 4), np.float32)).shape == (3, 2)


def test_the_class_of_ones_own_is_for_ones_own_alone(folder, iql, dataset, trained, run_stage):
    runs = shutil.copytree(trained, folder / "runs")
    assert run_stage("td3_bc", dataset, "--device=cpu", "--set=rl_trainer_params.num_epochs=1", root=runs).status == 0
    (run,) = (each for each, _ in list_runs(runs) if "td3_bc" in each.name)
    with pytest.raises(DydiffError, match="trained by td3_bc, whose class cannot be another: leave `agent` out"):
        load_policy(run / "agent.safetensors", agent=AGENTS["iql"])


@pytest.mark.parametrize(
    "agent_params, told",
    [
        ({"agent": "own_iql:IQN"}, "cannot be imported: AttributeError"),
        ({"agent": "ownn_iql:IQL"}, "cannot be imported: ModuleNotFoundError"),
        ({"agent": "IQL"}, "must have the form module:name, and is 'IQL'"),
        ({"agent": "own_iql:EDGE"}, "which is no class"),
        ({"agent": "own_iql:Noise"}, "which lacks act, act_for_evaluation, draw_noise"),
        ({"arguments": {"expectil": 0.9}}, "Unknown setting 'agent_params.arguments.expectil' of IQL: did you mean 'expectile'?"),
        ({"arguments": {"device": "cpu"}}, "Unknown setting 'agent_params.arguments.device' of IQL: there are"),
        ({"arguments": 3}, "agent_params.arguments' must be a mapping, not 3"),
        ({"agnet": "own_iql:IQL"}, "agent_params.agnet': did you mean 'agent'?"),
    ],
)
def test_what_is_no_algorithm_is_refused(folder, dataset, trained, command, agent_params, told):
    file = write_experiment(folder / "mine.yaml", **agent_params)
    refused = command("run", "-e", file, "--device=cpu", f"--outdir={shutil.copytree(trained, folder / 'runs')}")
    assert refused.status != 0 and told in refused.errors, refused.errors


def test_the_examples_file_asks_for_what_the_example_is():
    content = yaml.safe_load((EXAMPLES / "iql.yaml").read_text())
    assert content["constants"]["agent_params"]["agent"] == "examples.iql:IQL"
