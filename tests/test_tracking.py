"""Weights & Biases, on request: what it is told of a run, and that it never harms one. The package is a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import check_refusal

from dydiff.runs import read_log, read_run

CPU = "--device=cpu"
BASE = "--set=rl_trainer_params.real_ratio=1"


class Board:
    """What W&B has, by the identity of a run."""

    def __init__(self):
        self.begun: list[dict] = []
        self.lines: dict[str, list[dict]] = {}
        self.ends: dict[str, list[int]] = {}
        self.failing = ""  # the call that raises

    def attend(self, call: str) -> None:
        if self.failing == call:
            raise ConnectionError(f"{call}: no route to host\nand more")

    def init(self, **arguments) -> SimpleNamespace:
        self.attend("init")
        self.begun.append(arguments)
        lines, ends = (each.setdefault(arguments["id"], []) for each in (self.lines, self.ends))

        def log(line: dict) -> None:
            self.attend("log")
            lines.append(line)

        def finish(exit_code: int) -> None:
            self.attend("finish")
            ends.append(exit_code)

        return SimpleNamespace(log=log, finish=finish, define_metric=lambda name, step_metric: None)


@pytest.fixture
def board(monkeypatch) -> Board:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.setenv("DYDIFF_WANDB", "1")
    monkeypatch.setenv("WANDB_PROJECT", "hoppers")
    return board


def run_folders(tmp_path: Path) -> list[Path]:
    return sorted(folder for folder in (tmp_path / "runs").iterdir() if folder.is_dir())


def test_every_seed_is_a_run_with_the_numbers_of_its_log(board, run_stage, dataset, tmp_path):
    outcome = run_stage("td3_bc", dataset, CPU, BASE, "--set=seeds=[0, 1]")
    assert outcome.status == 0, outcome.errors
    folders = run_folders(tmp_path)
    for folder, begun in zip(folders, board.begun, strict=True):
        assert (begun["project"], begun["name"], begun["group"]) == ("hoppers", folder.name, "td3_bc")
        assert begun["config"]["constants"]["rl_trainer_params"]["num_epochs"] == 8 and Path(begun["dir"]) == folder
        assert board.lines[begun["id"]] == read_log(folder) and len(read_log(folder)) == 8
        assert board.ends[begun["id"]] == [0]
    assert len(board.lines) == 2


def test_a_longer_run_goes_on_in_the_same_one(board, run_stage, dataset, tmp_path):
    for epochs in (2, 3):
        assert run_stage("td3_bc", dataset, CPU, BASE, f"--set=rl_trainer_params.num_epochs={epochs}", "--resume").status == 0
    (folder,) = run_folders(tmp_path)
    assert [len(board.begun), list(board.ends.values())] == [2, [[0, 0]]]
    (lines,) = board.lines.values()
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines == read_log(folder)


@pytest.mark.parametrize("call", ["log", "finish"])
def test_what_fails_there_ends_no_training(call, board, run_stage, dataset, tmp_path):
    board.failing = call
    with pytest.warns(RuntimeWarning, match=f"Weights & Biases failed .ConnectionError: {call}: no route to host."):
        outcome = run_stage("reward", dataset, CPU)
    assert outcome.status == 0, outcome.errors
    (folder,) = run_folders(tmp_path)
    assert read_run(folder)["status"] == "finished" and read_log(folder)


def test_what_cannot_begin_says_so_before_training(board, run_stage, dataset, tmp_path, monkeypatch):
    board.failing = "init"
    told = "does not begin (ConnectionError: init: no route to host)", "WANDB_MODE=offline"
    check_refusal(run_stage("reward", dataset, CPU), *told)
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_refusal(run_stage("reward", dataset, CPU), "wandb does not import", "dydiff[wandb]")
    assert not (tmp_path / "runs").exists()


def test_nobody_is_told_unasked(board, run_stage, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("DYDIFF_WANDB", "0")
    assert run_stage("reward", dataset, CPU).status == 0
    assert not board.begun and not (run_folders(tmp_path)[0] / "wandb.id").exists()
