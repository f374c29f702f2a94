"""The report on a card: what a part that fails, hangs or comes too late costs, seen with parts that need no card."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "profiling"))

import gpu_report  # noqa: E402 - the folder is not a package, and must be found first


def python(name: str, code: str, seconds: int, writes: Path | None = None) -> gpu_report.Part:
    return gpu_report.Part(name, [sys.executable, "-c", code], seconds, writes and str(writes))


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """report(parts, *options) -> exit status, the report, what was printed."""

    def run(parts: list[gpu_report.Part], *options: str) -> tuple[int, dict, str]:
        monkeypatch.setattr(gpu_report, "list_parts", lambda *_: parts)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", f"--out={tmp_path}", *options])
        status = gpu_report.main()
        return status, json.loads((tmp_path / "gpu_report.json").read_text()), capsys.readouterr().out

    return run


def test_a_failing_part_costs_only_itself(report, tmp_path):
    numbers = tmp_path / "numbers.jsonl"
    write = f"import pathlib; pathlib.Path({str(numbers)!r}).write_text('{{\"median_s\": 1.5}}\\n')"
    status, written, output = report([python("broken", "print('why'); raise SystemExit(3)", 9), python("race", write, 9, numbers)])
    assert status == 1 and output.rstrip().endswith("failed: broken")
    assert written["parts"]["broken"]["status"] == 3 and "why" in written["parts"]["broken"]["output_tail"]
    assert written["parts"]["race"]["status"] == 0 and written["parts"]["race"]["numbers"] == [{"median_s": 1.5}]
    assert {"gpu", "torch", "triton", "commit"} <= set(written["machine"])


def test_a_hanging_part_ends_with_all_that_it_started(report, tmp_path):
    alive = tmp_path / "alive"
    grandchild = f"import time, pathlib\nfor _ in range(100): pathlib.Path({str(alive)!r}).write_text('x'); time.sleep(0.1)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    status, written, _ = report([python("hangs", code, 2)])
    assert status == 1 and written["parts"]["hangs"]["status"] == "timeout"
    assert "begun" in written["parts"]["hangs"]["output_tail"] and written["parts"]["hangs"]["seconds"] < 6
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists(), "what the part started is still running"


def test_an_interrupted_report_ends_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    part = f"import time, pathlib\nfor _ in range(100): pathlib.Path({str(alive)!r}).write_text('x'); time.sleep(0.1)"
    listed = f"lambda *_: [gpu_report.Part('long', [sys.executable, '-c', {part!r}], 60)]"
    code = f"import sys, gpu_report; gpu_report.list_parts = {listed}; sys.exit(gpu_report.main())"
    environment = os.environ | {"PYTHONPATH": str(gpu_report.REPO / "profiling")}
    command = [sys.executable, "-c", code, f"--out={tmp_path}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not alive.exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "error: interrupted.\n"
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists(), "what the part started is still running"


def test_what_a_killed_part_printed_is_kept_whoever_holds_its_pipe(report, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setattr(gpu_report, "LAST_WORDS", 0.5)
    elsewhere = "import subprocess, sys; print('begun'); "
    elsewhere += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(8)'], start_new_session=True)"
    status, written, _ = report([python("hangs", elsewhere, 2)])
    assert written["parts"]["hangs"]["status"] == "timeout" and written["parts"]["hangs"]["seconds"] < 5
    assert "begun" in written["parts"]["hangs"]["output_tail"]


def test_time_for_everything(report):
    parts = [python("long", "import time; time.sleep(30)", 60), python("late", "pass", 60)]
    status, written, output = report(parts, "--seconds=1")
    assert status == 1 and [part["status"] for part in written["parts"].values()] == ["timeout", "left out"]
    assert output.rstrip().endswith("failed: long, late")
    status, written, _ = report(parts, "--only", "late")
    assert status == 0 and list(written["parts"]) == ["late"]


def test_a_part_that_is_not_there_is_refused(report, capsys):
    with pytest.raises(SystemExit):
        report([python("race", "pass", 9), python("build", "pass", 9)], "--only", "rcae")
    assert "argument --only: there is no 'rcae' (did you mean race?); choose from race, build" in capsys.readouterr().err


@pytest.mark.parametrize("option, message", [
    ("--seconds=-3", "argument --seconds: -3 is not above 0"),
    ("--wheels=/nowhere", "argument --wheels: there is no folder '/nowhere'"),
    ("--cases=/nowhere", "argument --cases: there is no folder '/nowhere'"),
    (f"--out={__file__}/report", "name another folder"),
    ("--onyl=race", "did you mean --only?"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_part(report, option, message, capsys):
    with pytest.raises(SystemExit):
        report([python("race", "raise SystemExit('it ran')", 9)], option)
    assert message in capsys.readouterr().err


def test_parts_are_commands_that_exist(tmp_path):
    parts = gpu_report.list_parts(tmp_path, tmp_path, tmp_path, None)
    names = [part.name for part in parts]
    assert names.index("conformance") < names.index("race") and len(set(names)) == len(names)
    files = {word for part in parts for word in part.command if word.endswith(".py")}
    assert len(files) > 10 and all((gpu_report.REPO / file).is_file() for file in files)
