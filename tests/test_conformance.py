"""The recorded cases of the published implementation, through every backend that this machine has."""

from pathlib import Path

import conformance
import conformance_kinds
import numpy as np
import pytest
import torch

from dydiff.backends import ON_CPU
from dydiff.diffusion.edm import Denoiser
from dydiff.kernels.native import why_unavailable
from dydiff.networks.training_unet import TrainingUNet

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "conformance"
SMALL = REPO / "tests" / "data" / "conformance"
FOLDER = SHARED if SHARED.is_dir() else SMALL


def test_all_cases_pass(capsys):
    status = conformance.main([str(FOLDER), "--backend", "all"])
    output = capsys.readouterr().out
    assert status == 0, output
    assert output.splitlines()[-1].endswith(", 0 failed")


@pytest.mark.parametrize("precision", ["float32", "bf16", "winograd"])
@pytest.mark.parametrize("path", sorted(FOLDER.glob("edm_loss-*.npz")), ids=lambda path: path.stem)
def test_recorded_losses_by_what_trains(path, precision, monkeypatch):
    """The network that diffusion training evaluates, in each of its precisions."""
    if precision == "winograd" and why_unavailable():
        pytest.skip("the compiled CPU unit is not built here")
    plain = conformance_kinds.read_denoiser

    def for_training(case):
        denoiser = plain(case)
        return Denoiser(TrainingUNet(denoiser.network, precision), denoiser.observation_dim, denoiser.sigma_data)

    monkeypatch.setattr(conformance_kinds, "read_denoiser", for_training)
    runner, limit = conformance.KINDS["edm_loss"]
    pairs = runner(conformance.Case(path), "reference")
    assert max(conformance.relative_error(*pair) for pair in pairs.values()) <= (2e-2 if precision == "bf16" else limit)


def test_cases_of_every_kind_are_at_hand():
    """A folder with kinds missing would let `test_all_cases_pass` pass on less than it says."""
    assert {conformance.Case(path).meta["kind"] for path in FOLDER.glob("*.npz")} == set(conformance.KINDS)


@pytest.mark.parametrize("name", ["y", "limits_min"])
def test_a_wrong_number_fails(name, tmp_path, capsys):
    """The judge itself: one changed input or expectation must turn the case and the exit status red."""
    path = next(path for path in sorted(SMALL.glob("*.npz")) if name in np.load(path).files)
    arrays = dict(np.load(path))
    arrays[name] = arrays[name] + 0.1
    np.savez(tmp_path / path.name, **arrays)
    assert conformance.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_unknown_kind_fails(tmp_path, capsys):
    np.savez(tmp_path / "odd.npz", meta='{"kind": "odd"}')
    assert conformance.main([str(tmp_path)]) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_fails_alone(tmp_path, capsys):
    good = next(iter(sorted(SMALL.glob("*.npz"))))
    (tmp_path / "a.npz").write_bytes(good.read_bytes()[:200])
    np.savez(tmp_path / "b.npz", x=np.zeros(2))
    (tmp_path / "c.npz").write_bytes(good.read_bytes())
    assert conformance.main([str(tmp_path)]) == 1
    assert "1 passed, 2 failed" in capsys.readouterr().out


def test_an_empty_folder_is_an_error(tmp_path):
    assert conformance.main([str(tmp_path)]) == 1


def test_what_is_not_finite_must_be_the_same():
    nan, inf = float("nan"), float("inf")
    expected = torch.tensor([nan, inf, 3.0, 4.0])
    assert conformance.relative_error(expected, expected) == 0
    assert conformance.relative_error(torch.tensor([nan, inf, 3.0, 4.5]), expected) == pytest.approx(0.1)
    for wrong in ([1.0, inf, 3, 4], [nan, -inf, 3, 4], [nan, 1.0, 3, 4], [nan, inf, nan, 4]):
        assert not conformance.relative_error(torch.tensor(wrong), expected) < 1


def test_a_case_that_raises_fails_alone(tmp_path, capsys):
    for name in ("unet-a.npz", "edm_sample-reference.npz"):
        arrays = dict(np.load(SMALL / name))
        if name.startswith("unet"):
            del arrays["noise_label"]
        np.savez(tmp_path / name, **arrays)
    assert conformance.main([str(tmp_path)]) == 1
    *_, wrong, last = capsys.readouterr().out.splitlines()
    assert "FAIL" in wrong and "KeyError" in wrong and last == "1 passed, 1 failed"


def test_a_backend_that_cannot_take_a_network_skips_that_case_alone(tmp_path, capsys, monkeypatch):
    """Three taps instead of five: every backend but bf16 and winograd, where these are, computes it, to whatever numbers.

    But for `compiled`, which would compile for a minute what it takes like `reference`: any network.
    """
    monkeypatch.setattr(conformance, "BACKENDS", [name for name in conformance.BACKENDS if name != "compiled"])
    name = "edm_sample-reference.npz"
    arrays = dict(np.load(SMALL / name))
    arrays["meta"] = str(arrays["meta"]).replace('"kernel_size": 5', '"kernel_size": 3')
    for key in [key for key in arrays if key.startswith("w/") and arrays[key].shape[2:] == (5,)]:
        arrays[key] = arrays[key][:, :, 1:4]
    np.savez(tmp_path / name, **arrays)
    conformance.main([str(tmp_path), "--backend", "all"])
    lines = capsys.readouterr().out.splitlines()
    refusals = [line for line in lines if "taps" in line]
    skips = sum(map(conformance.is_available, ON_CPU))
    assert len(lines) == len([way for way in conformance.BACKENDS[1:] if conformance.is_available(way)]) + bool(skips) + 1
    assert len(refusals) == skips and all("skip" in line for line in refusals)
    if skips:
        assert conformance.main([str(tmp_path), "--backend", "bf16"]) == 1, "nothing passed"
        assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed"
