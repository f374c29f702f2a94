"""Several seeds in one process: each run folder holds what it would hold had its seed trained alone, whatever happens between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import DATASET, check_refusal
from forked import SUBPROCESS
from test_updates import FAST_MODES, assert_close, transitions

from dydiff import child
from dydiff.agents import AGENTS
from dydiff.checkpoint import load_checkpoint
from dydiff.data import load_dataset
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import load_experiment
from dydiff.experiments.seeds import NEXT_STATE
from dydiff.models import POLICY
from dydiff.replay import ReplayBuffer
from dydiff.reports.policy_runs import find_policy_runs, group_runs
from dydiff.rollout import RolloutEngine
from dydiff.runs import STATE, Run, list_runs, read_log, read_run, read_settings
from dydiff.updates import Updates

SEEDS = [3, 0, 1]
OPTIONS = {
    "td3_bc": ("td3_bc", {}),
    "diffusion_ql": ("diffusion_ql", {"ema_start": 2, "ema_every": 2}),
    "diffusion_ql-max_q_backup": ("diffusion_ql", {"max_q_backup": True, "lr_decay": True, "num_epochs": 4}),
    "cql": ("cql", {}),
}
CASES = [(name, "eager") for name in OPTIONS]
# Compiling takes long, and finds nothing in the other agents that it does not find in this one and in each agent alone.
CASES += [(name, mode) for mode in FAST_MODES for name in AGENTS if mode == "graph" or name == "td3_bc"]


def make_updates(variant: str, seed: int, mode: str) -> Updates:
    name, options = OPTIONS[variant]
    agent = AGENTS[name](5, 2, [32, 32], generator=torch.Generator().manual_seed(seed), **options)
    synthetic = ReplayBuffer(100, 5, 2, "cpu")
    synthetic.extend(transitions(3 if seed == 0 else 50, seed=10 + seed))  # one has too few for its share
    real = ReplayBuffer.from_transitions(transitions(80, seed=1), 1000)
    return Updates(agent, real, synthetic, 16, 0.6, torch.Generator().manual_seed(20 + seed), mode, 0)


def test_one_seed_together_is_that_seed_alone():
    alone = make_updates("td3_bc", 0, "eager")
    assert Updates.together([alone]) is alone


@pytest.mark.parametrize("variant, mode", CASES)
def test_seeds_update_together_as_alone(variant, mode):
    alone = [make_updates(variant, seed, "eager") for seed in SEEDS]
    together = Updates.together([make_updates(variant, seed, mode) for seed in SEEDS])
    for step in range(6):
        if step == 3:
            for updates in (*alone, together):
                for learner in updates.learners:
                    learner.agent.end_epoch()
                    learner.synthetic.extend(transitions(20, seed=4))
        figures = together.run_all(1)
        for ours, updates, learner in zip(figures, alone, together.learners, strict=True):
            where = f"step {step}, seed"
            assert_close(ours, updates.run(1), where)
            assert_close(learner.agent.state_dict(), updates.learners[0].agent.state_dict(), where)
            assert torch.equal(learner.generator.get_state(), updates.learners[0].generator.get_state())
            observation = transitions(5, seed=9).observation
            acts = [each.act(observation, torch.Generator().manual_seed(0)) for each in (learner.agent, updates.learners[0].agent)]
            assert_close(*acts, where)


def test_a_seed_that_is_loaded_goes_on_for_itself():
    """Weights of one seed are written where the common update finds them, and no other seed sees it."""
    together = Updates.together([make_updates("td3_bc", seed, "eager") for seed in SEEDS])
    reference = Updates.together([make_updates("td3_bc", seed, "eager") for seed in SEEDS])
    other = make_updates("td3_bc", 7, "eager").learners[0].agent
    together.learners[1].agent.load_state_dict(other.state_dict())
    for updates in (together, reference):
        updates.run_all(2)
    states = [[learner.agent.state_dict() for learner in updates.learners] for updates in (together, reference)]
    for index, (ours, theirs) in enumerate(zip(*states, strict=True)):
        assert torch.equal(ours["critics"]["layers.0.weight"], theirs["critics"]["layers.0.weight"]) == (index != 1)


@pytest.fixture
def run(command, dataset, trained, tmp_path):
    """Runs a tiny policy experiment in a folder that begins with the trained models, with settings overridden."""

    def run(folder: str, stage: str, *overrides: str, resume: bool = False):
        root = tmp_path / folder
        if not root.exists():
            shutil.copytree(trained, root)
        file = tiny.write_experiment(tmp_path / f"{stage}.yaml", stage, DATASET)
        changes = [word for text in overrides for word in ("--set", text)]
        return command("run", "-e", file, "--device=cpu", f"--outdir={root}", *changes, *["--resume"] * resume)

    return run


def policies(root: Path) -> dict[int, Path]:
    """The policy runs under a folder, by seed."""
    folders = [folder for folder, record in list_runs(root) if record["kind"] == POLICY]
    return {read_settings(folder)["constants"]["seed"]: folder for folder in folders}


def figures(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read_log(folder)]


def products(folder: Path) -> dict[str, object]:
    return {file.name: load_checkpoint(file, POLICY) for file in sorted(folder.glob("agent*.safetensors"))}


@pytest.mark.parametrize("stage, beside", [("td3_bc", "true"), ("diffusion_ql", "false"), ("cql", "false")])
def test_each_seed_leaves_what_it_would_alone(run, dataset, tmp_path, monkeypatch, stage, beside):
    monkeypatch.setattr(child, "subprocess", SUBPROCESS)  # real starts of a worker have tests of their own
    worker = f"rl_trainer_params.evaluation_worker={beside}"
    assert run("together", stage, "seeds=[3, 0]", worker).status == 0
    for seed in (3, 0):
        assert run("alone", stage, f"seed={seed}", worker).status == 0
    ours, theirs = policies(tmp_path / "together"), policies(tmp_path / "alone")
    assert list(ours) == list(theirs) == [3, 0]
    for seed in ours:
        assert ours[seed].name[6:] == theirs[seed].name[6:] == f"{stage}-s{seed}"
        assert read_settings(ours[seed]) == read_settings(theirs[seed])
        assert_close(figures(ours[seed]), figures(theirs[seed]), f"log of {seed}")
        mine, other = products(ours[seed]), products(theirs[seed])
        assert {"agent.safetensors", "agent-best.safetensors"} < mine.keys()
        for name, (tree, _) in mine.items():
            assert_close(tree, other[name][0], f"{name} of {seed}")
        state, expected = (load_checkpoint(each[seed] / STATE, "training state")[0]["stage"] for each in (ours, theirs))
        assert_close(state, expected, f"state of {seed}")
    assert products(ours[3]).keys() == products(ours[0]).keys()

    runs = find_policy_runs(tmp_path / "together", load_dataset(dataset))
    (variant,) = group_runs(runs)
    assert sorted(variant.runs) == [0, 3]


def test_a_seed_rolls_out_the_same_policy_object_in_every_epoch(run, monkeypatch):
    """On a GPU the graphs of a rollout belong to it: with another one in each epoch none would ever be captured."""
    seen, roll_out = [], RolloutEngine.roll_out

    def watch(engine, policy, start, source, *rest):
        seen.append((engine, policy, source))
        return roll_out(engine, policy, start, source, *rest)

    monkeypatch.setattr(RolloutEngine, "roll_out", watch)
    assert run("together", "td3_bc", "seeds=[3, 0]", "rl_trainer_params.num_epochs=3").status == 0
    assert len(seen) == 6 and seen[0] == seen[2] == seen[4] and seen[1] == seen[3] == seen[5] and seen[0] != seen[1]


@pytest.mark.parametrize("instant", ["between the states", "before the renames", "between the renames"])
def test_a_kill_while_the_states_are_saved_costs_nothing(run, tmp_path, monkeypatch, instant):
    """Whichever files a killed process had written, the seeds resume at one epoch and end like an undisturbed run."""
    settings = "seeds=[0, 1]", "rl_trainer_params.freq_saving=2"
    assert run("undisturbed", "td3_bc", *settings).status == 0

    class Killed(BaseException):
        """Nothing on the way handles it, as nothing handles a SIGKILL."""

    work = {"save": Run.save_state, "rename": os.replace}
    done = {"save": 0, "rename": 0}
    # Of two seeds, at the second saving (epoch 4): after how many states written beside the old ones, and how many renamed.
    last = {"between the states": ("save", 3), "before the renames": ("rename", 2), "between the renames": ("rename", 3)}[instant]

    def watch(name: str, arguments: tuple) -> object:
        if last == (name, done[name]):
            raise Killed
        done[name] += 1
        return work[name](*arguments)

    def save_state(self, stage, name=STATE):
        return watch("save", (self, stage, name)) if name == NEXT_STATE else work["save"](self, stage, name)

    def replace(source, target):
        return watch("rename", (source, target)) if Path(source).name == NEXT_STATE else work["rename"](source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", save_state)
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run("disturbed", "td3_bc", *settings)
    ours, theirs = policies(tmp_path / "disturbed"), policies(tmp_path / "undisturbed")
    assert [len(read_log(ours[seed])) for seed in (0, 1)] == [4, 4]
    assert run("disturbed", "td3_bc", *settings, resume=True).status == 0
    for seed in (0, 1):
        assert figures(ours[seed]) == figures(theirs[seed])
        for name, (tree, _) in products(ours[seed]).items():
            torch.testing.assert_close(tree, products(theirs[seed])[name][0], rtol=0, atol=0)
        assert not (ours[seed] / NEXT_STATE).exists()


def test_finished_seeds_are_left_alone_and_unequal_ones_refused(run, tmp_path):
    assert run("runs", "td3_bc", "seed=1").status == 0
    before = read_run(policies(tmp_path / "runs")[1])
    outcome = run("runs", "td3_bc", "seeds=[1, 2]", resume=True)
    assert outcome.status == 0 and "Already finished" in outcome.output
    runs = policies(tmp_path / "runs")
    assert read_run(runs[1]) == before and sorted(runs) == [1, 2]

    (runs[1] / "run.json").write_text((runs[1] / "run.json").read_text().replace('"finished"', '"interrupted"'))
    check_refusal(run("runs", "td3_bc", "seeds=[1, 4]", resume=True), "same epoch", "at 8", "at 0", "--set seed=N")


def contents(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_refused_resume_changes_nothing(run, tmp_path):
    assert run("runs", "td3_bc", "seeds=[0, 1]", "rl_trainer_params.num_epochs=2").status == 0
    folders, root = policies(tmp_path / "runs"), tmp_path / "runs"
    shutil.copy(folders[1] / STATE, folders[1] / NEXT_STATE)  # as a kill between two renames leaves them
    before = contents(root)
    for _ in range(2):
        longer = run("runs", "td3_bc", "seeds=[0, 1, 2]", "rl_trainer_params.num_epochs=4", resume=True)
        check_refusal(longer, "same epoch", "at 2", "at 0")
        assert contents(root) == before and policies(root) == folders
    outcome = run("runs", "td3_bc", "seeds=[0, 1]", "rl_trainer_params.num_epochs=2", resume=True)
    assert outcome.status == 0 and outcome.output.count("Already finished") == 2
    assert run("runs", "td3_bc", "seeds=[0, 1]", "rl_trainer_params.num_epochs=4", resume=True).status == 0
    assert policies(root) == folders and [len(read_log(folder)) for folder in folders.values()] == [4, 4]


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["seeds=[0, 1]", "seed=2"], ["'seed' and 'seeds'", "remove one"]),
        (["seeds=[0, 1, 0]"], ["different seeds", "[0, 1, 0]"]),
        (["seeds=[]"], ["different seeds"]),
        (["seeds=[0, -1]"], ["seeds[1]", "at least 0"]),
        (["seeds=4"], ["must be a list"]),
        (["variables.seeds=[[0, 1]]"], ["'seeds' belongs under 'constants'", "'seed'"]),
    ],
)
def test_misuse_is_refused(run, overrides, parts):
    check_refusal(run("runs", "td3_bc", *overrides), *parts)


@pytest.mark.parametrize("place", ["constants", "variables"])
def test_an_override_takes_the_place_of_the_files_seeds(tmp_path, place):
    file = tmp_path / "experiment.yaml"

    def load(settings: str, *overrides: str) -> list[list[int]]:
        text = settings if "constants" in settings else f"constants: {{dataset_name: x, td3_bc_params: {{}}}}\n{settings}"
        file.write_text(text)
        experiment = load_experiment(file, list(overrides))
        assert all(variant.constants.seeds is None for variant in experiment.variants)
        return [[experiment.variants[index].constants.seed for index in group] for group in experiment.groups]

    if place == "constants":
        own = "constants: {dataset_name: x, td3_bc_params: {}, seeds: [5, 6]}"
        assert load(own) == [[5, 6]] and load(own, "seed=1") == [[1]] and load(own, "seeds=[7]") == [[7]]
        with pytest.raises(DydiffError, match="both given"):
            load(own.replace("seeds:", "seed: 1, seeds:"))
    else:
        own = "variables: {seed: [5, 6], td3_bc_params.tau: [0.1, 0.2]}"
        assert load(own) == [[5], [5], [6], [6]] and load(own, "seeds=[1, 2]") == [[1, 2], [1, 2]]
        with pytest.raises(DydiffError, match="both given"):
            load("variables: {seed: [5]}\nconstants: {dataset_name: x, td3_bc_params: {}, seeds: [1]}")


def test_models_train_with_one_seed(run):
    check_refusal(run("runs", "dynamics", "seeds=[0, 1]"), "only policies", "dynamics")
    assert run("runs", "td3_bc", "seeds=[0, 1]", "seeds=null", "seed=2", "rl_trainer_params.num_epochs=1").status == 0
