"""Disks that fill up under checkpoints, logs, datasets and downloads: one paragraph, and what was there before is whole."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import DATASET
from forked import children
from small_disk import fill, run_on_small_disk
from test_download import NAME, server  # noqa: F401 - a fixture

from dydiff.checkpoint import load_checkpoint, save_checkpoint
from dydiff.cli import main
from dydiff.data import dataset_from_arrays, download, load_dataset, write_dataset
from dydiff.errors import DydiffError
from dydiff.runs import Run, read_log, read_run
from dydiff.runs.drive import drive


def refusal(function, *arguments) -> str:
    """The message of the DydiffError that a call must end with."""
    try:
        function(*arguments)
    except DydiffError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")


def make_arrays(rows: int) -> dict[str, np.ndarray]:
    source = np.random.default_rng(rows)
    ends = np.arange(rows) == rows - 1
    return {
        "observations": source.normal(size=(rows, 4)).astype(np.float32),
        "actions": source.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": source.normal(size=rows).astype(np.float32),
        "terminals": ends,
        "timeouts": ends,
    }


class Walk:
    """A stage that draws numbers; its third epoch fills the disk, or makes a long line for the log."""

    def __init__(self, folder: Path, spoilt: str):
        self.folder, self.spoilt = folder, spoilt
        self.epoch, self.position = 0, torch.zeros(2000)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def finished(self) -> bool:
        return self.epoch == 5

    def run_epoch(self) -> dict[str, float]:
        self.position = self.position + torch.randn(2000, generator=self.generator)
        self.epoch += 1
        if self.epoch == 3 and self.spoilt:
            fill(self.folder)
        length = 5000 if self.spoilt == "log" and self.epoch == 3 else 1
        return {"x" * length: float(self.position[0])}

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.generator.set_state(state["generator"])

    def save_products(self, save, final: bool) -> None:
        if final:
            save("model.safetensors", "walk", self.position, {})


def run_out_of_space(folder: Path, spoilt: str) -> None:
    dataset = dataset_from_arrays(make_arrays(8), "some")

    def train(spoilt: str) -> dict:
        run = Run(folder / "run", "walk", dataset, {"a": 1})
        drive(Walk(folder, spoilt), run, save_every=1)
        return load_checkpoint(folder / "run" / "model.safetensors", "walk")[0]

    told = refusal(train, spoilt)
    name = {"log": "log.jsonl", "state": "state.safetensors"}[spoilt]
    assert f"{folder}/run/{name}'" in told and "No space left on device" in told and "untouched" in told
    state, manifest = load_checkpoint(folder / "run" / "state.safetensors", "training state")
    assert manifest["epoch"] == state["stage"]["epoch"] == 2
    assert not list((folder / "run").glob("*.part")) and read_run(folder / "run")["status"] != "finished"
    # With space again, the run ends as it would have.
    os.unlink(folder / "filler")
    resumed = train("")
    undisturbed = Walk(folder, "")
    log = [undisturbed.run_epoch() for _ in range(5)]
    assert torch.equal(resumed, undisturbed.position)
    assert [line["x"] for line in read_log(folder / "run")] == [line["x"] for line in log]


@pytest.mark.parametrize("spoilt", ["log", "state"])
def test_a_run_on_a_disk_that_fills_up(tmp_path, spoilt):
    run_on_small_disk(run_out_of_space, tmp_path / "disk", spoilt)


def save_on_full_disk(folder: Path) -> None:
    path = folder / "x.safetensors"
    save_checkpoint(path, "thing", torch.ones(1000), {})
    fill(folder)
    told = refusal(save_checkpoint, path, "thing", torch.zeros(100_000), {})
    assert f"Cannot write '{path}'" in told and "Free space" in told and "untouched" in told
    assert torch.equal(load_checkpoint(path, "thing")[0], torch.ones(1000))
    assert sorted(os.listdir(folder)) == ["filler", "x.safetensors"]


def test_a_checkpoint_on_a_full_disk(tmp_path):
    run_on_small_disk(save_on_full_disk, tmp_path / "disk")


def write_on_full_disk(folder: Path, name: str) -> None:
    path, small, large = folder / name, make_arrays(50), make_arrays(60_000)
    write_dataset(path, small, {})
    told = refusal(write_dataset, path, large, {})
    assert str(path) in told and "Free space or choose another path" in told
    np.testing.assert_array_equal(load_dataset(path).observations, small["observations"])
    assert os.listdir(folder) == [name]


@pytest.mark.parametrize("name", ["x.hdf5", "x.npz"])
def test_a_dataset_on_a_full_disk(tmp_path, name):
    run_on_small_disk(write_on_full_disk, tmp_path / "disk", name)


def download_on_full_disk(folder: Path, url: str, length: int) -> None:
    os.environ.update(D4RL_DATASET_DIR=str(folder), DYDIFF_D4RL_URL=url, no_proxy="127.0.0.1")
    (folder / "other").write_bytes(bytes((1 << 20) - 8192))
    told = refusal(download.download_dataset, NAME)
    part = folder / "hopper_medium-v2.hdf5.part"
    assert f"Cannot write '{part}': No space left on device. Free space and repeat the command" in told
    assert 0 < part.stat().st_size <= 8192
    os.unlink(folder / "other")
    assert download.download_dataset(NAME).stat().st_size == length


def test_a_download_on_a_full_disk(tmp_path, server):  # noqa: F811
    server.length = None  # a server that announced it would be refused before
    run_on_small_disk(download_on_full_disk, tmp_path / "disk", server.url, len(server.content))
    assert "Range" in server.requests[-1], "what had arrived was fetched again"


def refuse_commands(folder: Path, dataset_folder: Path, experiment: Path, reason: str) -> None:
    """Every command that writes names the folder and the reason, in its last line and without a traceback."""
    os.environ["D4RL_DATASET_DIR"] = str(dataset_folder)
    if "space" in reason:
        fill(folder)
    for arguments in (
        ["run", "-e", experiment, "--device=cpu", f"--outdir={folder}"],
        ["train", "-m", DATASET, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={folder}"],
        ["collect", DATASET, "--steps=40", f"--path={folder / 'x.hdf5'}"],
    ):
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
            assert main([str(argument) for argument in arguments]) == 1
        last = told.getvalue().splitlines()[-1]
        assert last.startswith("error: Cannot") and str(folder) in last and reason in last, told.getvalue()
        assert "Traceback" not in told.getvalue()


@pytest.mark.parametrize("reason", ["No space left on device", "Read-only file system"])
def test_commands_on_a_disk_that_takes_nothing(tmp_path, dataset_folder, reason):
    experiment = tiny.write_experiment(tmp_path / "experiment.yaml", "reward", DATASET)
    given = refuse_commands, tmp_path / "disk", dataset_folder, experiment, reason
    run_on_small_disk(*given, read_only="Read-only" in reason)


def write_beyond_the_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    path = folder / "x.safetensors"
    save_checkpoint(path, "thing", torch.ones(1000), {})
    assert f"Cannot write '{path}'" in refusal(save_checkpoint, path, "thing", torch.zeros(100_000), {})
    assert torch.equal(load_checkpoint(path, "thing")[0], torch.ones(1000))
    for name in ("x.hdf5", "x.npz"):
        assert str(folder / name) in refusal(write_dataset, folder / name, make_arrays(20_000), {})
    assert os.listdir(folder) == ["x.safetensors"]


def test_files_that_may_not_grow(tmp_path):
    """A quota of the process, which needs no rights: every write beyond it fails, as on a full disk."""
    child = children.Process(target=write_beyond_the_limit, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
