"""Fixtures that several test files share: a small dataset collected once, and commands run inside this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import tiny

from dydiff.cli import main
from dydiff.collect import collect

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


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory) -> Path:
    """A dataset folder that holds 3,000 rows of maze2d-umaze-local."""
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
