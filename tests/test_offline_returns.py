"""The benchmark of returns with real processes: it trains what is missing, resumes what was killed, and extends its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import SUBPROCESS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import offline_returns  # noqa: E402 - the folder is not a package, and must be found first
from returns_report import compare  # noqa: E402

from dydiff.experiments import workers  # noqa: E402
from dydiff.reports.uncertainty import bootstrap_difference, bootstrap_interval, standard_error  # noqa: E402
from dydiff.runs import list_runs, read_log  # noqa: E402

TINY = "--device=cpu --workers=2 --algorithms=td3_bc --horizon=8 --dim=16 --dim-mults=1,2 --duration=0.0004 --one-step-epochs=2"
TINY += " --one-step-updates=5 --epochs=3 --updates=4 --starts=6 --hidden=8 --eval-steps=10 --fast"


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch):
    """What runs in this process forks its workers; the benchmark that is killed is a process of its own, and starts them."""
    monkeypatch.setattr(workers, "subprocess", SUBPROCESS)


def run(capfd, out: Path, dataset: str, options: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = offline_returns.main([f"--dataset={dataset}", f"--out={out}", *TINY.split(), *options.split()])
    return status, *capfd.readouterr()


def products(out: Path) -> dict[str, int]:
    """When the finished runs' products were written."""
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/*/*.safetensors") if file.stem in ("model", "agent")}


def test_trains_extends_and_merges(dataset, tmp_path, capfd):
    out = tmp_path / "out"
    status, output, errors = run(capfd, out, dataset, "--methods=softmax --seeds=0 --set td3_bc_params.alpha=2.0")
    assert status == 0, errors
    first = products(out)
    assert len(first) == 4, "three models and a policy"
    kinds = sorted(record["kind"] for _, record in list_runs(out))
    assert kinds == ["diffusion model", "dynamics model", "policy", "reward model"]
    assert "DyDiff + TD3+BC" in output and "Not finished" not in output

    # Settings that an older dydiff did not have make no other runs of its runs.
    for file in out.glob("*/*td3_bc-softmax*/settings.yaml"):
        settings = yaml.safe_load(file.read_text())
        del settings["constants"]["sampler_kwargs"]["inpaint_churn"]
        file.write_text(yaml.safe_dump(settings))

    # Another seed and another method: nothing is trained again, and one report holds all of it.
    status, output, errors = run(capfd, out, dataset, "--methods=base,softmax --seeds=0,1 --set td3_bc_params.alpha=2.0")
    assert status == 0, errors
    now = products(out)
    assert len(now) == 7 and first.items() <= now.items()
    assert output.count("Already finished") == 4
    record = json.loads((out / "report.json").read_text())
    assert str(tmp_path) not in json.dumps(record) + (out / "report.md").read_text(), "no path of this machine in a report"
    (task,) = record["tasks"]
    trained = [(score["variant"], score["seeds"]) for score in task["scores"]]
    assert trained == [("TD3+BC", [0, 1]), ("fast DyDiff + TD3+BC", [0, 1])]
    for score in task["scores"]:
        logs = [read_log(out / task["dataset"] / folder) for folder in score["folders"]]
        last, best = ([pick([line["evaluation/return"] for line in log]) for log in logs] for pick in (lambda r: r[-1], max))
        assert score["last"]["by_seed"] == last and score["best"]["by_seed"] == best
        assert score["last"]["mean"] == np.mean(last) and score["last"]["standard_error"] == standard_error(np.array(last))
        assert score["last"]["normalized_score"] is None, "local data have no D4RL score"
        assert score["last"]["scaled_return"] == pytest.approx(100 * (np.mean(last) - 23.85) / (161.86 - 23.85))
        assert score["curve"]["updates"] == [4, 8, 12] and np.shape(score["curve"]["interval"]) == (2, 3)
        assert score["simulator"] == [f"dydiff-maze2d, MuJoCo {score['simulator'][0].split()[-1]}"]
        assert score["settings"]["td3_bc_params.alpha"] == 2 and "td3_bc_params.tau" not in score["settings"]
    assert task["scores"][1]["settings"]["sampler_kwargs.fast"] is True
    assert "sampler_kwargs.fast" not in task["scores"][0]["settings"]
    assert [each["base"] for each in task["differences"]] == ["TD3+BC"]
    assert (out / task["picture"]).read_bytes().startswith(b"\x89PNG") and task["picture"] in output
    assert "no D4RL score" in output


def test_killed_and_stopped_runs_continue(dataset, tmp_path, capfd):
    out, epochs = tmp_path / "out", 300
    command = [sys.executable, str(BENCHMARKS / "offline_returns.py"), f"--dataset={dataset}", f"--out={out}", *TINY.split()]
    command += ["--methods=base", "--seeds=0,1", f"--epochs={epochs}", "--eval-every=300"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    killed, stopped = wait_for(lambda: two_under_way(out))
    os.kill(worker_in(killed), signal.SIGKILL)
    wait_for(lambda: worker_in(killed) is None)
    benchmark.send_signal(signal.SIGTERM)  # the other one saves and stops
    output, errors = benchmark.communicate(timeout=60)
    assert benchmark.returncode == 1, output + errors
    before = {folder: read_log(folder) for folder in (killed, stopped)}
    assert all(12 < len(log) < epochs for log in before.values())

    status, output, errors = run(capfd, out, dataset, f"--methods=base --seeds=0,1 --epochs={epochs} --eval-every=300")
    assert status == 0, errors
    runs = dict(list_runs(out))
    assert set(runs) == {killed, stopped}, "the same folders"
    assert all(record["status"] == "finished" for record in runs.values())
    for folder, log in before.items():
        now = read_log(folder)
        assert [line["epoch"] for line in now] == list(range(1, epochs + 1))
        assert now[:10] == log[:10], "these epochs were not repeated: the lines hold times"


def two_under_way(out: Path) -> list[Path] | None:
    """The folders of two runs that have saved their state, once there are two."""
    folders = sorted(log.parent for log in out.glob("*/*/log.jsonl") if len(read_log(log.parent)) > 12)
    return folders if len(folders) == 2 else None


def wait_for(condition, seconds: float = 60.0):
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


def worker_in(folder: Path) -> int | None:
    """The process that trains in a folder."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(folder) in words and "worker" in words:
            return int(entry.parent.name)
    return None


def test_failures_are_told_and_the_rest_is_reported(dataset, tmp_path, capfd):
    out = tmp_path / "out"
    status, _, errors = run(capfd, out, dataset, "--report-only")
    assert status == 1 and "nothing to report on yet" in errors
    status, _, errors = run(capfd, out, dataset, f"--methods=softmax --models={tmp_path}")
    assert status == 1 and "No finished diffusion model run" in errors
    with pytest.raises(SystemExit):
        offline_returns.main(["--dataset", dataset, "--methods=softmaxx"])
    assert "softmaxx" in capfd.readouterr().err


def test_a_wrong_setting_or_dataset_is_told_before_anything_trains(dataset, tmp_path, capfd):
    out = tmp_path / "out"
    status, _, errors = run(capfd, out, dataset, "--methods=softmax --seeds=0 --set td3_bc_params.alhpa=2.0")
    assert status == 1 and "did you mean 'alpha'" in errors
    status, _, errors = run(capfd, out, f"{dataset},{tmp_path}/gone.hdf5", "--methods=softmax --seeds=0")
    assert status == 1 and "gone.hdf5" in errors
    assert not list(out.iterdir()), "something was begun"


def test_intervals():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, size=30))
        covered += low <= 3.0 <= high
    assert 85 <= covered <= 100
    assert bootstrap_interval(np.array([1.0])) is None and bootstrap_interval(np.ones((4, 2))).tolist() == [[1, 1], [1, 1]]
    low, high = bootstrap_difference(rng.normal(5, 1, 40), rng.normal(3, 1, 40))
    assert 1 < low < 2 < high < 3
    assert bootstrap_difference(np.ones(1), np.ones(3)) is None


def test_differences_are_to_the_same_base():
    def score(name: str, algorithm: str, dydiff: bool, updates: int, returns: list[float]) -> dict:
        common = {"variant": name, "algorithm": algorithm, "dydiff": dydiff, "simulator": ["s"]}
        return {**common, "curve": {"updates": [updates]}, "last": {"by_seed": returns}}

    base, ours = score("base", "td3_bc", False, 10, [1, 2]), score("ours", "td3_bc", True, 10, [5, 6, 7])
    others = [score("other", "cql", False, 10, [0, 0]), score("longer", "td3_bc", False, 20, [9, 9])]
    (difference,) = compare([base, ours, *others])
    assert (difference["base"], difference["mean"]) == ("base", 4.5) and 2 < difference["interval"][0] < 4.5
    assert compare([ours, *others]) == []


def test_a_setting_of_one_algorithm_leaves_the_others_alone(dataset, tmp_path, capfd):
    changes = "--methods=base --seeds=0 --set td3_bc_params.alpha=2.0"
    status, _, errors = run(capfd, tmp_path, dataset, f"--algorithms=td3_bc,cql {changes}")
    assert status == 0, errors
    (settings,) = (yaml.safe_load(file.read_text()) for file in tmp_path.glob("*/*td3_bc-base*/settings.yaml"))
    assert settings["constants"]["td3_bc_params"]["alpha"] == 2.0 and len(products(tmp_path)) == 2
    status, _, errors = run(capfd, tmp_path, dataset, f"--algorithms=cql {changes}")
    assert status == 1 and "does not use td3_bc_params" in errors
