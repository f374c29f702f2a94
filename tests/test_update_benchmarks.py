"""The benchmarks of updates and epochs: baselines compute what dydiff computes, and their records are complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import epoch_speed  # noqa: E402 - the folder is not a package, and must be found first
import updates_speed  # noqa: E402
from harness import Failures  # noqa: E402

PROMISED = "case variant device dtype batch horizon evaluations median_s speedup tflops peak_bytes commit".split()

EPOCH = """--quick --seconds=0.01 --device=cpu --starts=3 --horizon=8 --dim=16 --dim-mults=1,2 --num-steps=3
--evaluation-steps=60""".split()


@pytest.fixture(autouse=True)
def few_transitions(monkeypatch):
    monkeypatch.setattr(updates_speed, "TRANSITIONS", 2000)
    monkeypatch.setattr(updates_speed, "UPDATES_A_CALL", dict.fromkeys(updates_speed.AGENTS_OF, 2))
    monkeypatch.setattr(updates_speed, "CHECKED_UPDATES", 2)
    monkeypatch.setattr(epoch_speed, "REPLAY", 2000)
    monkeypatch.setattr(epoch_speed, "UPDATES", 3)
    monkeypatch.setattr("dydiff.updates.WORTH_COMPILING", 10**9)  # compiled updates have tests of their own


@pytest.mark.parametrize("name", updates_speed.AGENTS_OF)
def test_baselines_make_the_same_updates(name):
    failures = Failures()
    _, errors = updates_speed.make_update_case(name, ["published", "stock", "eager"], "cpu", failures)
    assert not failures.told
    assert errors["eager"] == 0 and max(errors.values()) < 1e-3


def test_a_wrong_baseline_is_left_out(monkeypatch):
    monkeypatch.setattr("update_baselines.Agent.make_optimizer", lambda self, n: torch.optim.Adam(n.parameters(), lr=4e-4))
    failures = Failures()
    case, _ = updates_speed.make_update_case("td3bc", ["published", "eager"], "cpu", failures)
    assert [variant.name for variant in case.variants] == ["eager"]
    assert failures.told[0].startswith("published in td3bc: Variant 'published' (float32) is wrong")


def test_an_epoch_that_cannot_be_made_or_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    def fail(self, *arguments, **settings):
        raise RuntimeError("no such device")

    for method in ("__init__", "run"):
        with monkeypatch.context() as patch:
            patch.setattr(epoch_speed.OurEpochs, method, fail)
            options = "--variants=published,ours", "--cases=epoch", f"--json={tmp_path / method}"
            assert epoch_speed.main([*EPOCH, *options]) == 1
        assert [line["variant"] for line in read_lines(tmp_path / method)] == ["published"]
        assert "RuntimeError: no such device" in capsys.readouterr().err


def read_lines(file: Path) -> list[dict]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(set(PROMISED) <= line.keys() for line in lines)
    return lines


def test_records_of_updates(tmp_path, capsys):
    options = f"--quick --seconds=0.01 --device=cpu --variants=published,eager --json={tmp_path}/json"
    options += " --cases=td3bc,four_seeds,replay_insert"
    assert updates_speed.main([*options.split(), f"--plot={tmp_path}/plot.png"]) == 0
    assert [(line["case"], line["variant"]) for line in read_lines(tmp_path / "json")] == [
        ("td3bc", "published"),
        ("td3bc", "eager"),
        ("four_seeds", "eager, alone"),
        ("four_seeds", "eager, together"),
        ("replay_insert", "published"),
        ("replay_insert", "ours"),
    ]
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_records_of_epochs_hold_the_breakdown(tmp_path):
    files = f"--json={tmp_path}/json --plot={tmp_path}/plot.png".split()
    assert epoch_speed.main([*EPOCH, *files, "--variants=published,ours,beside"]) == 0
    lines = read_lines(tmp_path / "json")
    assert [line["variant"] for line in lines] == ["published", "ours", "published", "ours", "beside"]
    for line in lines[2:]:
        parts = [line[f"{part}_s"] for part in epoch_speed.PARTS]
        assert min(parts) >= 0 and 0 < 3 * sum(parts) <= 1.5 * line["max_s"] + 1
