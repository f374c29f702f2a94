"""Fixtures that several test files share: a small dataset collected once, and commands run inside this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import tiny

from dydiff.cli import main
from dydiff.collecting.collect import collect
from dydiff.errors import DydiffError

DATASET = "maze2d-umaze-local"

# A test says the same today and tomorrow, and a busy machine makes none fail.
hypothesis.settings.register_profile("dydiff", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dydiff")


@dataclass
class Outcome:
    """What a command leaves behind on a terminal."""

    status: int
    output: str
    errors: str


def check_refusal(outcome, *parts: str) -> None:
    """The command failed with one readable paragraph that holds all `parts`."""
    assert outcome.status == 1, outcome.errors
    (line,) = (line for line in outcome.errors.splitlines() if line.startswith("error: "))
    assert outcome.errors.rstrip().endswith(line), "something follows the message"
    assert "Traceback" not in outcome.errors
    for part in parts:
        assert part in line, line


def refusal(function: Callable, *arguments: object) -> str:
    """The message, one paragraph, of the DydiffError that a call ends with."""
    with pytest.raises(DydiffError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_usage(outcome, *parts: str) -> None:
    """argparse refused the command: usage, then one line that holds all `parts`."""
    assert outcome.status == 2 and outcome.errors.startswith("usage: ")
    line = outcome.errors.splitlines()[-1]
    for part in ("error: ", *parts):
        assert part in line, line


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    """A dataset folder that holds 3,000 rows of maze2d-umaze-local; collecting them takes a simulator."""
    pytest.importorskip("mujoco")
    folder = tmp_path_factory.mktemp("datasets")
    collect(DATASET, steps=3000, seed=0, path=folder / f"{DATASET}.hdf5", progress=False)
    return folder


@pytest.fixture
def dataset(dataset_folder, monkeypatch) -> str:
    """The name of a dataset that can be loaded by it."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(dataset_folder))
    return DATASET


@pytest.fixture(scope="session")
def trained(dataset_folder, tmp_path_factory) -> Path:
    """A folder with finished runs of the tiniest diffusion, dynamics and reward model on the dataset."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D4RL_DATASET_DIR", str(dataset_folder))
        assert main(["train", "-m", DATASET, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={root}"]) == 0
        for stage in ("dynamics", "reward"):
            file = tiny.write_experiment(root / f"{stage}.yaml", stage, DATASET)
            assert main(["run", "-e", str(file), "--device=cpu", f"--outdir={root}"]) == 0
    return root


@pytest.fixture
def command(capsys) -> Callable[..., Outcome]:
    """Runs `dydiff ARGUMENTS` in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            status = exit.code
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def dataset_file(dataset_folder, tmp_path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copy(dataset_folder / f"{DATASET}.hdf5", tmp_path / "copy.hdf5"))


@pytest.fixture
def train(command, tmp_path):
    """Runs `dydiff train` with tiny settings under tmp_path/runs."""

    def run(dataset: object, *more: str):
        return command("train", "-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={tmp_path / 'runs'}", *more)

    return run


@pytest.fixture
def run_stage(command, tmp_path):
    """Runs `dydiff run` on a tiny experiment of one stage under tmp_path/runs."""

    def run(stage: str, dataset: object, *more: str, variables: dict | None = None, root: Path = tmp_path / "runs"):
        file = tiny.write_experiment(tmp_path / "experiment.yaml", stage, str(dataset), variables)
        return command("run", "-e", file, f"--outdir={root}", *(more or ["--device=cpu"]))

    return run
