"""Runs that come to grief: what they say, what is saved from before, and where they go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import check_refusal

from dydiff.agents import TD3BC
from dydiff.checkpoint import load_checkpoint, save_checkpoint
from dydiff.finite import find_not_finite
from dydiff.fit import Fit
from dydiff.models import DIFFUSION, DYNAMICS, POLICY, REWARD, load_policy
from dydiff.runs import Run, read_log, read_run, read_state
from dydiff.runs.drive import drive

CPU = "--device=cpu"
MODELS = ("dyn_model_params", "model_params")


def only_run(root: Path) -> Path:
    (run,) = (folder for folder in root.iterdir() if folder.is_dir())
    return run


def check_saved(run: Path, epoch: int) -> None:
    """The run has failed, and its state is that of an epoch, all of it finite."""
    state, manifest = load_checkpoint(run / "state.safetensors", "training state")
    assert manifest["epoch"] == epoch and read_run(run)["status"] == "failed"
    learnt = state["stage"].get("agent") or state["stage"]["model"]
    assert find_not_finite(learnt) is None


def spoil_update(monkeypatch, number: int) -> None:
    """A policy whose weights hold a NaN once it has been updated so often."""
    update = TD3BC.apply_update

    def spoilt_update(self, batch, noise, variant):
        if self.step == number:
            with torch.no_grad():
                self.critics.parameters().__next__().fill_(torch.nan)
        return update(self, batch, noise, variant)

    monkeypatch.setattr(TD3BC, "apply_update", spoilt_update)


def test_nan_in_a_policys_update_is_told_with_update_and_tensor(run_stage, dataset, tmp_path, monkeypatch):
    spoil_update(monkeypatch, 18)  # epoch 5 of 4 updates an epoch; states are saved every 3 epochs
    outcome = run_stage("td3_bc", dataset, CPU, "--set=rl_trainer_params.real_ratio=1")
    run = only_run(tmp_path / "runs")
    told = "diverged in update 18 (epoch 5)", "train/critic_loss", "tensor 'policy.", "The state after epoch 3", str(run)
    check_refusal(outcome, *told)
    check_saved(run, epoch=3)
    assert [line["epoch"] for line in read_log(run)] == [1, 2, 3, 4]


def test_learning_rates_that_diverge_in_the_first_epoch_leave_the_initial_state(run_stage, dataset, tmp_path):
    settings = ["--set=rl_trainer_params.real_ratio=1", "--set=td3_bc_params.qf_lr=1e30"]
    check_refusal(run_stage("td3_bc", dataset, CPU, *settings), "(epoch 1)", "Lower the learning rates", "after epoch 0")
    check_saved(only_run(tmp_path / "runs"), epoch=0)


def test_nan_in_the_loss_of_a_one_step_model(run_stage, dataset, tmp_path):
    outcome = run_stage("reward", dataset, CPU, "--set=model_params.lr=1e30")
    check_refusal(outcome, "RewardModel is not finite at step", "weights diverged", "The state after epoch 0")
    check_saved(only_run(tmp_path / "runs"), epoch=0)


def test_nan_in_the_loss_of_the_diffusion_model(train, dataset, tmp_path):
    outcome = train(dataset, "--lr=1e30", "--ramp=0.000001")
    check_refusal(outcome, "The diffusion loss is", "samples (", "Lower --lr", "The state after epoch 0")
    run = only_run(tmp_path / "runs")
    assert find_not_finite(load_checkpoint(run / "state.safetensors", "training state")[0]["stage"]["denoiser"]) is None


@pytest.fixture
def models(trained, tmp_path) -> dict[str, Path]:
    """Copies of the trained models that a test may damage."""
    root = Path(shutil.copytree(trained, tmp_path / "trained"))
    return {read_run(file.parent)["kind"]: file for file in root.glob("*/model.safetensors")}


def use(models: dict[str, Path]) -> list[str]:
    return [
        f"--set=diff_model_params.model_paths={models[DIFFUSION]}",
        f"--set=dyn_model_params.load_path={models[DYNAMICS]}",
        f"--set=model_params.load_path={models[REWARD]}",
    ]


def rewrite(file: Path, kind: str, change) -> None:
    """Pass the tensors and the manifest of a checkpoint through `change`."""
    tree, manifest = load_checkpoint(file, kind)
    change(tree, manifest)
    save_checkpoint(file, kind, tree, {key: value for key, value in manifest.items() if key not in ("format", "kind", "dydiff")})


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (DYNAMICS, ["A rollout holds in its observation a NaN or an infinity, first in row ", ", step 1."]),
        (REWARD, ["The reward model scores a rollout of epoch 1 with NaN or infinity"]),
    ],
)
def test_nan_in_a_rollout_is_told_with_tensor_and_place(run_stage, dataset, models, tmp_path, kind, told):
    def enlarge(tree: dict, manifest: dict) -> None:
        for name, tensor in tree.items():
            if name.endswith("weight"):
                tensor.mul_(1e30)

    rewrite(models[kind], kind, enlarge)
    outcome = run_stage("td3_bc", dataset, CPU, *use(models))
    check_refusal(outcome, *told, "The state after epoch 0")
    check_saved(only_run(tmp_path / "runs"), epoch=0)


def test_the_hardmax_filter_keeps_one_of_one_and_buffers_are_saved_where_asked(run_stage, dataset, models, tmp_path):
    settings = "num_epochs=3", "freq_saving=2", "rollout_batch_size=1", "keep_condition.filter_type=hardmax"
    settings += "save_replay_buffer=true", "save_model_replay_buffer=true"
    options = [f"--set=rl_trainer_params.{setting}" for setting in settings]
    assert run_stage("td3_bc", dataset, CPU, *options, *use(models)).status == 0
    for name, kept in ("agent-000002", 2 * 7), ("agent", 3 * 7):  # transitions of so many epochs
        tree, _ = load_checkpoint(only_run(tmp_path / "runs") / f"{name}.safetensors", POLICY)
        assert tree["replay"]["reward"].numel() > 2000 and tree["model_replay"]["reward"].numel() == kept
    assert load_policy(only_run(tmp_path / "runs") / "agent.safetensors").agent.step > 0


def test_models_with_nan_other_scaling_or_torn_manifests_are_refused(run_stage, dataset, models):
    def spoil(tree: dict, manifest: dict) -> None:
        tree[next(name for name in tree if name.endswith("bias"))].view(-1)[0] = torch.nan

    def rescale(tree: dict, manifest: dict) -> None:
        manifest["scaling"]["std"][1] *= 1.5

    def widen(tree: dict, manifest: dict) -> None:
        manifest["model"]["hidden_dims"] = [9]

    def misname(tree: dict, manifest: dict) -> None:
        manifest["model"]["hiden_dims"] = manifest["model"].pop("hidden_dims")

    def shift(tree: dict, manifest: dict) -> None:
        tree["limits"]["maximum"][0] += 1

    whole = {kind: file.read_bytes() for kind, file in models.items()}
    for kind, change, *told in (
        (DYNAMICS, spoil, "NaN", "bias"),
        (REWARD, spoil, "NaN", "bias"),
        (DYNAMICS, rescale, "scales by another std", "Train one with this run's dataset"),
        (REWARD, rescale, "scales by another std"),
        (REWARD, widen, "does not fit its own manifest"),
        (DYNAMICS, misname, "does not fit its own manifest", "hiden_dims"),
        (DIFFUSION, shift, "scales by another maximum"),
    ):
        rewrite(models[kind], kind, change)
        check_refusal(run_stage("td3_bc", dataset, CPU, *use(models)), str(models[kind]), *told)
        models[kind].write_bytes(whole[kind])


def test_models_that_are_replaced_between_start_and_resume(run_stage, dataset, models, tmp_path, monkeypatch):
    spoil_update(monkeypatch, 18)
    assert run_stage("td3_bc", dataset, CPU, *use(models)).status == 1
    monkeypatch.setattr(TD3BC, "apply_update", TD3BC.apply_update)
    whole = models[REWARD].read_bytes()
    rewrite(models[REWARD], REWARD, lambda tree, manifest: next(iter(tree.values())).add_(0.1))
    outcome = run_stage("td3_bc", dataset, CPU, *use(models), "--resume")
    check_refusal(outcome, "began with another model", str(models[REWARD]), "Put the old file back")
    models[REWARD].write_bytes(whole)
    check_refusal(run_stage("td3_bc", dataset, CPU, *use(models), "--resume"), "diverged in update 18")


def write_status(run: Path, status: str) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": status}))


def test_a_state_that_does_not_fit_leaves_the_run_as_it_was(train, dataset, tmp_path):
    assert train(dataset).status == 0
    run = only_run(tmp_path / "runs")
    write_status(run, "interrupted")
    before = {file: file.read_bytes() for file in run.iterdir()}
    check_refusal(train(dataset, f"--resume={run}", "--duration=0.0001"), "Resume it with a longer --duration")
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    state = run / "state.safetensors"
    state.write_bytes(b"?" + before[state])
    check_refusal(train(dataset, f"--resume={run}"), "state.safetensors", "damaged")
    assert {file: file.read_bytes() for file in run.iterdir()} == {**before, state: b"?" + before[state]}


def figures(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read_log(run)]


def test_a_moved_outdir_keeps_its_models(run_stage, command, trained, dataset, tmp_path):
    """Wherever it lies, a run goes on with the very models it began with; even if others lie where those were."""

    def train(root: Path, epochs: int, *more: str) -> Path:
        options = ["--set=rl_trainer_params.num_epochs=" + str(epochs), *(f"--set={word}.load_path=auto" for word in MODELS)]
        assert run_stage("td3_bc", dataset, CPU, *options, *more, root=root).status == 0
        (run,) = root.glob("*-td3_bc-s0")
        return run

    whole, old, new = tmp_path / "whole", tmp_path / "old", tmp_path / "else[where]"
    for root in (whole, old):
        shutil.copytree(trained, root)
    expected = figures(train(whole, 4))
    train(old, 2)
    old.rename(new)
    report = "report", f"--dataset={dataset}", "--starts=2", CPU
    quality = "sampler-quality", f"--dataset={dataset}", "--starts=2", "--first=5", "--warm=2", "--warm_sigma=0.3", CPU
    for words in (report, quality):
        assert command(*words, f"--outdir={new}").status == 0
    shutil.copytree(trained, old)
    for file, kind in ((file, read_run(file.parent)["kind"]) for file in old.glob("*/model.safetensors")):
        if kind == REWARD:
            rewrite(file, kind, lambda tree, manifest: next(iter(tree.values())).add_(0.1))
    run = train(new, 4, "--resume")
    assert figures(run) == expected
    record = read_run(run)
    paths = [Path(path) for paths in record["models"].values() for path in paths]
    assert {path.parents[1] for path in paths if "reward" in path.parent.name} == {new.resolve()}
    assert record["model_digests"].keys() == set(map(str, paths))

    shutil.rmtree(old)
    for file in new.glob("*/model.safetensors"):
        file.unlink()
    outcome = command(*report, f"--outdir={new}")
    check_refusal(outcome, str(run / "run.json"), "model.safetensors", f"under '{new}'", "Put the file back")
    before = (run / "run.json").read_text()
    longer = run_stage("td3_bc", dataset, CPU, "--set=rl_trainer_params.num_epochs=5", "--resume", root=new)
    check_refusal(longer, str(run / "run.json"), "Put the file back")
    assert (run / "run.json").read_text() == before


def test_out_of_memory_in_an_epoch_says_where_to_go_on(run_stage, dataset, tmp_path, monkeypatch):
    run_epoch = Fit.run_epoch

    def hungry(self):
        if self.epoch == 3:
            torch.empty(2**50)
        return run_epoch(self)

    monkeypatch.setattr(Fit, "run_epoch", hungry)
    outcome = run_stage("reward", dataset, CPU)
    run = only_run(tmp_path / "runs")
    check_refusal(outcome, "Out of memory in epoch 4", "The state after epoch 3", str(run), "--resume", "smaller batches")
    check_saved(run, epoch=3)


def test_a_signal_behind_the_last_epoch_leaves_a_finished_run(run_stage, dataset, monkeypatch, tmp_path):
    close = Run.close

    def interrupted(self, status):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self, status)

    monkeypatch.setattr(Run, "close", interrupted)
    outcome = run_stage("reward", dataset, CPU)
    assert outcome.status == 0, outcome.errors
    assert read_state(only_run(tmp_path / "runs")) == "finished"


def test_a_resumed_progress_bar_begins_where_the_run_does(run_stage, dataset, monkeypatch, tmp_path):
    run_epoch = Fit.run_epoch

    def interrupted(self):
        if self.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_epoch(self)

    with monkeypatch.context() as patch:
        told: list[object] = []
        patch.setattr("dydiff.runs.drive.os", SimpleNamespace(write=lambda *arguments: told.extend(arguments)))
        patch.setattr(Fit, "run_epoch", interrupted)
        outcome = run_stage("reward", dataset, CPU)
    assert told == [2, b"\nStopping as soon as what is under way can be saved. A second signal stops at once, without saving.\n"]
    check_refusal(outcome, "Stopped by SIGTERM after epoch 4; the state is saved", f"{CPU} --resume")
    (run,) = (tmp_path / "runs").iterdir()
    assert read_state(run) == "interrupted"
    status = run / "run.json"
    status.write_text(status.read_text().replace("interrupted", "running"))  # as SIGKILL leaves it
    assert read_state(run) == "killed"
    with open(run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_state(run) == "running" and read_state(tmp_path) == "new"
    outcome = run_stage("reward", dataset, CPU, "--resume")
    assert outcome.status == 0 and "| 4/10 [" in outcome.errors.split("\r")[1]


def test_the_progress_bar_tells_of_rollouts_while_they_are_made(run_stage, dataset, models):
    outcome = run_stage("td3_bc", dataset, CPU, *use(models))
    bars = outcome.errors.split("\r")
    told = [index for index, bar in enumerate(bars) if "rolling out" in bar]
    assert outcome.status == 0 and "rolling out" not in bars[-1] and "return=" in bars[-1]
    assert f", rolling out {tiny.POLICY['rollout_batch_size']:,} starts]" in bars[told[0]].strip()
    assert "epoch=1, " in bars[told[1]], "what the first epoch gave is still shown"


def test_every_checkpoint_tells_its_origin(run_stage, dataset, models, tmp_path):
    assert run_stage("td3_bc", dataset, CPU, *use(models)).status == 0
    run = only_run(tmp_path / "runs")
    for file in run.glob("agent*.safetensors"):
        manifest = load_checkpoint(file, "policy")[1]
        assert manifest["dataset"] == dataset and len(manifest["fingerprint"]) == 64 and manifest["dydiff"]
        assert manifest["settings"]["constants"]["rl_trainer_params"]["num_epochs"] == tiny.POLICY["num_epochs"]
        assert {path: len(digest) for path, digest in manifest["model_digests"].items()} == dict.fromkeys(
            (str(file.resolve()) for file in models.values()), 64
        )


@pytest.mark.parametrize("cost, states", [(0.5, [2, 4, 6, 8, 10, 12, 14, 15]), (2.0, [2, 8, 14, 15])])
def test_states_that_take_long_are_saved_less_often(monkeypatch, cost, states):
    """Epochs of eight seconds, every second of which is due."""
    clock, saved = [0.0], []
    monkeypatch.setattr("dydiff.runs.drive.time.monotonic", lambda: clock[0])

    def train(epochs: int) -> dict[str, float]:
        clock[0] += 8
        stage.epoch += 1
        stage.finished = stage.epoch == epochs
        return {}

    def save(stage: SimpleNamespace) -> int:
        clock[0] += cost
        saved.append(stage.epoch)
        return stage.epoch

    stage = SimpleNamespace(epoch=0, finished=False, run_epoch=lambda: train(15), save_products=lambda save, final: None)
    nothing = {name: lambda *arguments: None for name in ("log", "close", "save")}
    drive(stage, SimpleNamespace(restore=lambda stage: 0, save_state=save, **nothing), save_every=2)
    assert saved == states
