"""The benchmarks' command line: what is wrong is refused before any work, by the name of the option."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import action_evidence  # noqa: E402
import epoch_speed  # noqa: E402
import learning_curves  # noqa: E402
import offline_returns  # noqa: E402
import perfect_dynamics  # noqa: E402
import pretrain_speed  # noqa: E402
import rollout_accuracy  # noqa: E402
import rollout_speed  # noqa: E402
import roofline  # noqa: E402
import updates_speed  # noqa: E402
from command_line import FULL_SIZE, describe_size, output_file, tells_errors  # noqa: E402
from harness import BenchmarkError  # noqa: E402

WRONG = [
    (rollout_speed, "--variants=winogrd", "argument --variants: there is no 'winogrd' (did you mean winograd?); choose from"),
    (rollout_speed, "--cases=evaluation,rolout", "there is no 'rolout' (did you mean rollout?)"),
    (rollout_speed, "--batch=8,-3", "argument --batch: -3 is not above 0"),
    (rollout_speed, "--batch=8,8", "'8,8' names something twice"),
    (rollout_speed, "--batch=8,x", "argument --batch: invalid list of int value: '8,x'"),
    (rollout_speed, "--baatch=8", "unrecognized arguments: --baatch=8 (did you mean --batch?)"),
    (rollout_speed, "--plot=speed.txt", "'speed.txt' does not end in .png, .pdf, .svg"),
    (pretrain_speed, "--variants=stok", "there is no 'stok' (did you mean stock?)"),
    (pretrain_speed, "--dim=0", "argument --dim: 0 is not above 0"),
    (updates_speed, "--variants=fast", "there is no 'fast'"),
    (updates_speed, "--seconds=nan", "argument --seconds: nan is not above 0 and finite"),
    (epoch_speed, "--starts=0", "argument --starts: 0 is not above 0"),
    (roofline, "--variants=bf17", "there is no 'bf17' (did you mean bf16?)"),
    (learning_curves, "--dataset=x --mode=fast", "argument --mode: there is no 'fast'; choose from auto, eager"),
    (learning_curves, "--dataset=x --agent=td3bc", "argument --agent: there is no 'td3bc' (did you mean td3_bc?)"),
    (rollout_speed, "--horizon=32,30", "divisible by 4; 30 is not, 28 is"),
    (rollout_speed, "--dim=12", "dim must be divisible by 8"),
    (rollout_speed, "--dim-mults=1,2,4,8", "divisible by 8; 100 is not, 96 is"),
    (pretrain_speed, "--horizon=32,30", "30 is not, 28 is"),
    (epoch_speed, "--horizon=30", "30 is not, 28 is"),
    (epoch_speed, "--num-steps=1", "argument --num-steps: the sampler has no fewer than 2"),
    (roofline, "--horizon=30", "30 is not, 28 is"),
    (offline_returns, "--dataset=x --horizon=30", "30 is not, 28 is"),
    (offline_returns, "--dataset=x --models=/nowhere", "argument --models: there is no folder '/nowhere'"),
    (perfect_dynamics, "x ./x", "argument RUN: a run is named twice"),
    (learning_curves, "--dataset=x --seeds=0,0", "'0,0' names something twice"),
    (offline_returns, "--dataset=x --methods=hardmx", "there is no 'hardmx' (did you mean hardmax?)"),
    (rollout_accuracy, "--dataset=x --starts=-1", "argument --starts: -1 is not above 0"),
    (action_evidence, "--dataset=x --kept=0", "argument --kept: 0 is not above 0"),
    (perfect_dynamics, "x --seeds=-1", "argument --seeds: -1 is not between 0 and"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_options_are_refused_at_once(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script", [rollout_speed, learning_curves, rollout_accuracy, action_evidence, perfect_dynamics])
def test_what_cannot_be_written_is_refused_before_the_work(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    needed = {rollout_speed: [], perfect_dynamics: ["x"]}.get(script, ["--dataset=x"])
    for place, reason in (("file/speed.json", "File exists"), ("folder.json", "it is a folder")):
        with pytest.raises(SystemExit):
            script.main([*needed, f"--json={tmp_path / place}"])
        error = capsys.readouterr().err
        assert f"argument --json: cannot write '{tmp_path / place}' ({reason}); name another file" in error


def test_a_write_protected_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "speed.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nothing is protected from root
    with pytest.raises(argparse.ArgumentTypeError, match="it is write-protected"):
        output_file(str(tmp_path / "speed.json"))
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"


def test_a_folder_for_the_report_is_tried(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        offline_returns.main(["--report-only", f"--out={tmp_path / 'file' / 'returns'}"])
    error = capsys.readouterr().err
    assert f"argument --out: cannot write into '{tmp_path / 'file' / 'returns'}' (Not a directory); name another folder" in error


def test_a_mode_that_this_machine_lacks_is_refused_before_the_data_is_read(capsys):
    assert learning_curves.main(["--dataset=x", "--mode=graph", "--device=cpu"]) == 1
    assert "update_mode 'graph' records CUDA graphs" in capsys.readouterr().err


def test_the_summary_refuses_what_it_does_not_know():
    done = subprocess.run([sys.executable, BENCHMARKS / "summary.py", "--jsno"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --jsno" in done.stderr and not done.stdout


def test_a_folder_for_the_output_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_file("~/new/folder/speed.json") == tmp_path / "new" / "folder" / "speed.json"
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_small_network_is_told():
    assert describe_size(argparse.Namespace()) == ""
    assert describe_size(argparse.Namespace(dim=FULL_SIZE[0], dim_mults=list(FULL_SIZE[1]))) == ""
    assert describe_size(argparse.Namespace(dim=16, dim_mults=[1, 2])) == "small network: dim 16, multiples 1,2"


def test_errors_end_in_a_line(capsys):
    def fail(error: BaseException) -> None:
        raise error

    assert tells_errors(fail)(BenchmarkError("It is wrong.")) == 1
    assert capsys.readouterr().err == "error: It is wrong.\n"
    assert tells_errors(fail)(KeyboardInterrupt()) == 130
    assert tells_errors(lambda: None)() == 0
    with pytest.raises(ZeroDivisionError):
        tells_errors(lambda: 1 // 0)()
