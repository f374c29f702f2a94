"""`dydiff data`: what it prints on good files, what it finds in bad ones, and that converting loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import DATASET, check_refusal, check_usage

from dydiff.collecting.collect import collect
from dydiff.data import RawDataset, load_dataset, read_dataset, write_dataset
from dydiff.data_tools.dynamics_check import check_dynamics, find_closest
from dydiff.data_tools.validation import find_problems
from dydiff.environments import environment_spec

REPOSITORY = Path(__file__).parents[1]
ROWS = 12
ACTIONS = ("list", "inspect", "validate", "convert", "download", "check-dynamics")


def make_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(ROWS, 11))
    observations[:, 0], observations[:, 1] = 1.25, 0.0  # a hopper that stands
    following = np.concatenate((observations[1:], observations[:1]))
    following[4, 0] = 0.5  # and falls once
    return {
        "observations": observations,
        "next_observations": following,
        "actions": generator.uniform(-1, 1, (ROWS, 3)),
        "rewards": np.arange(ROWS, dtype=np.float32),
        "terminals": np.arange(ROWS) == 4,
        "timeouts": np.arange(ROWS) == 11,
    }


def find(change: dict[str, np.ndarray | None], environment: str | None = "hopper") -> list[str]:
    arrays = {key: values for key, values in {**make_arrays(), **change}.items() if values is not None}
    return [str(finding) for finding in find_problems(RawDataset("x", None, arrays, {}), environment)]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Path:
    """A thousand rows of random actions in stock MuJoCo."""
    path = tmp_path_factory.mktemp("hopper") / "hopper.hdf5"
    return collect("hopper-random-local", steps=1000, seed=0, path=path, progress=False)


def test_help(command):
    listing = command("data", "--help")
    assert listing.status == 0 and all(f"\n    {action}" in listing.output for action in ACTIONS)
    for action in ACTIONS:
        assert command("data", action, "--help").status == 0
    outcome = command("data", "inspect", "x", "--pictur=a.png")
    assert outcome.status == 2 and "did you mean --picture?" in outcome.errors


def test_help_imports_nothing_heavy():
    code = "import sys, dydiff.cli\ntry: dydiff.cli.main()\nfinally: print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, "data", "--help"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert time.perf_counter() - begin < 2  # it takes 0.1 s; the limit allows for a busy machine
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "[]"


def test_list(command, dataset):
    everything = command("data", "list").output
    for name in ("hopper-medium-v2", "antmaze-large-play-v2", "maze2d-umaze-v1", "walker2d-random-local"):
        assert f"\n{name} " in everything
    (line,) = command("data", "list", "--here").output.splitlines()[1:]
    assert line.startswith(DATASET) and "MB" in line
    assert len(command("data", "list", "hopper-medium").output.splitlines()) > 5
    assert "walker" not in command("data", "list", "hopper-medium").output


# inspect


def test_inspect(command, tmp_path):
    path = write_dataset(tmp_path / "mine.hdf5", make_arrays(), {"environment": "hopper", "seed": 3})
    outcome = command("data", "inspect", path, "--picture", tmp_path / "a.png")
    assert outcome.status == 0, outcome.errors
    for words in (
        "environment   hopper",
        "metadata      seed: 3",
        "rows          12",
        "rewards float32 [12]",
        "NaN, infinite none",
        "episodes      2 (1 end by a terminal, 1 by time), 0 rows behind the last",
        "lengths       min 5, mean 6, median 6, max 7",
        "returns       min 10, mean 33, median 33, max 56",  # 0 + ... + 4 and 5 + ... + 11
    ):
        assert words in outcome.output, outcome.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_counts_what_loading_refuses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = make_arrays()
    arrays["actions"][3:5, 1] = np.nan
    arrays["rewards"][:] = np.inf
    np.savez("odd.npz", **arrays)
    outcome = command("data", "inspect", "odd.npz")
    assert outcome.status == 0, outcome.errors
    assert "NaN, infinite actions 2, rewards 12" in outcome.output and Path("odd.npz.png").exists()
    outcome = command("data", "inspect", "odd.npz", "--picture", "b")
    assert outcome.status == 0 and "Picture: b.png" in outcome.output and (tmp_path / "b.png").is_file()
    outcome = command("data", "inspect", "odd.npz", "--picture", "none/a.png")
    assert outcome.status == 1 and "none/a.png" in outcome.errors


def test_inspect_without_an_end_of_an_episode(command, tmp_path):
    arrays = {**make_arrays(), "terminals": np.zeros(ROWS), "timeouts": np.zeros(ROWS)}
    path = write_dataset(tmp_path / "open.hdf5", arrays, {})
    outcome = command("data", "inspect", path, "--picture", tmp_path / "a.png")
    assert outcome.status == 0 and "12 rows behind the last" in outcome.output


@pytest.mark.parametrize(
    "change",
    [
        {"actions": np.zeros((2, 2)), "rewards": np.array(0)},
        {"timeouts": np.zeros(ROWS - 1)},
        {"rewards": np.zeros((ROWS, 2))},
        {"actions": np.full((ROWS, 3), b"x")},
        {key: values[:0] for key, values in make_arrays().items()},
    ],
)
def test_inspect_refuses_rows_that_do_not_belong_together(command, tmp_path, change):
    np.savez(tmp_path / "bad.npz", **{**make_arrays(), **change})
    outcome = command("data", "inspect", tmp_path / "bad.npz")
    assert outcome.status == 1 and outcome.errors.startswith("error: ") and "data validate" in outcome.errors


def test_d4rl_names_have_scores(command, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_dataset(tmp_path / "hopper_medium-v2.hdf5", make_arrays(), {})
    outcome = command("data", "inspect", "hopper-medium-v2", "--picture", tmp_path / "a.png")
    assert f"score         {100 * (33 + 20.272305) / (3234.3 + 20.272305):.1f} " in outcome.output
    outcome = command("data", "inspect", tmp_path / "hopper_medium-v2.hdf5", "--picture", tmp_path / "a.png")
    assert "score  " not in outcome.output


# validate


def test_good_data_have_no_defects(command, dataset, hopper):
    constant = "note    observations is constant in [0, 1] columns"
    assert find({}) == [constant]
    for name in (dataset, hopper):
        outcome = command("data", "validate", name)
        assert outcome.status == 0 and "defect " not in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": None}, ["defect  rewards is missing"]),
        ({"observations": np.zeros(ROWS)}, ["defect  observations has shape (12,); it must be a matrix"]),
        ({"actions": np.zeros((ROWS - 1, 3))}, ["defect  actions has 11 rows, but observations has 12"]),
        ({"rewards": np.zeros((ROWS, 2))}, ["defect  rewards has shape (12, 2); it must hold one number per step"]),
        ({"actions": np.full((ROWS, 3), b"x")}, ["defect  actions holds |S1 values"]),
        ({"infos/qpos": np.zeros((4, 6))}, ["defect  infos/qpos has 4 rows, but observations has 12"]),
        ({"next_observations": np.zeros((ROWS, 5))}, ["defect  next_observations has 5 columns"]),
        ({"rewards": np.where(np.arange(ROWS) % 5 == 2, np.nan, 1)}, ["numbers: rows 2, 7"]),
        ({"terminals": np.where(np.arange(ROWS) == 3, 0.5, 0)}, ["defect  terminals holds something else", ": row 3"]),
        ({"actions": np.full((ROWS, 3), 1.5)}, ["outside the range of hopper: rows 0, 1, 2, ", "8, 9, ... (12 rows)"]),
        ({"actions": np.zeros((ROWS, 6))}, ["11 observation and 6 action columns, but hopper has 11 and 3"]),
        ({"terminals": np.zeros(ROWS), "timeouts": np.zeros(ROWS)}, ["defect  no episode ends"]),
        ({"timeouts": np.ones(ROWS)}, ["defect  no transition is left: every row but the last ends an episode by time"]),
        ({"timeouts": np.arange(ROWS) < ROWS - 1}, ["defect  no transition is left"]),
        ({"timeouts": np.arange(ROWS) == 4}, ["note    terminals and timeouts mark the same row", ": row 4", "last 7 rows"]),
        ({"next_observations": make_arrays()["observations"]}, ["note    next_observations is not", "contradict", ": row 4"]),
    ],
)
def test_defects_are_found_with_their_rows(change, words):
    listing = "\n".join(find(change))
    for word in words:
        assert word in listing, listing


def test_all_defects_are_listed_and_the_command_fails(command, tmp_path):
    arrays = make_arrays()
    arrays["actions"][[2, 6]] = 3.0
    arrays["rewards"][5] = np.nan
    np.savez(tmp_path / "bad.npz", **arrays)
    outcome = command("data", "validate", tmp_path / "bad.npz", "--environment=Hopper-v2")
    assert outcome.status == 1 and "has 2 defects" in outcome.errors
    assert "rows 2, 6" in outcome.output and "row 5" in outcome.output


def test_episodes_beyond_the_time_limit():
    rows = 2500
    arrays = {
        "observations": np.random.default_rng(0).normal(size=(rows, 11)),
        "actions": np.zeros((rows, 3)),
        "rewards": np.arange(rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.isin(np.arange(rows), [999, 2499]),
    }
    listing = "\n".join(str(finding) for finding in find_problems(RawDataset("x", None, arrays, {}), "hopper"))
    assert "longer than the 1000 steps of hopper; they begin here: row 1000" in listing
    del arrays["timeouts"]
    assert not any(finding.is_defect for finding in find_problems(RawDataset("x", None, arrays, {}), "hopper"))
    assert any("no time limit" in str(finding) for finding in find_problems(RawDataset("x", None, arrays, {}), None))


# convert


def test_conversion_loses_nothing(command, tmp_path):
    arrays = {**make_arrays(), "infos/qpos": np.ones((ROWS, 6)), "metadata/policy/fc0/weight": np.eye(3)}
    first = write_dataset(tmp_path / "a.hdf5", arrays, {"environment": "hopper", "seed": 3, "noise": 0.5})
    assert command("data", "convert", first, tmp_path / "b.npz").status == 0
    assert command("data", "convert", tmp_path / "b.npz", tmp_path / "c.h5").status == 0
    raw = [read_dataset(path) for path in (first, tmp_path / "b.npz", tmp_path / "c.h5")]
    for other in raw[1:]:
        assert other.metadata == raw[0].metadata and set(other.arrays) == set(raw[0].arrays) == set(arrays)
        for key, values in arrays.items():
            np.testing.assert_array_equal(other.arrays[key], values)
            assert other.arrays[key].dtype == values.dtype
    assert load_dataset(first).fingerprint == load_dataset(tmp_path / "b.npz").fingerprint
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["metadata/environment"][()] == b"hopper"


def test_conversion_replaces_only_by_force(command, tmp_path):
    source = write_dataset(tmp_path / "a.hdf5", make_arrays(), {})
    target = tmp_path / "b.npz"
    target.write_text("precious")
    outcome = command("data", "convert", source, target)
    assert outcome.status == 1 and "--force" in outcome.errors and target.read_text() == "precious"
    assert command("data", "convert", source, target, "--force").status == 0 and len(load_dataset(target)) == ROWS
    outcome = command("data", "convert", source, tmp_path / "b.txt")
    assert outcome.status == 1 and ".npz" in outcome.errors


def test_conversion_blames_the_source(command, tmp_path):
    source, target = tmp_path / "nan.npz", tmp_path / "e.hdf5"
    np.savez(source, **{**make_arrays(), "rewards": np.full(ROWS, np.nan)})
    check_refusal(command("data", "convert", source, target), f"Dataset '{source}': rewards holds NaN")
    assert not target.exists()


# check-dynamics


def measure(path: Path, environment: str) -> dict[str, tuple[float, float]]:
    """Largest state and reward error, by simulator."""
    _, errors = check_dynamics(read_dataset(path), environment, rows=150, seed=0)
    return {each.simulator.split(",")[0]: (each.state.max(), each.reward.max()) for each in errors if not each.failure}


def test_stock_data_are_recognised(command, hopper):
    outcome = command("data", "check-dynamics", hopper, "--rows=150")
    assert outcome.status == 0, outcome.errors
    assert "closest: gymnasium-v4, MuJoCo" in outcome.output and "infos/qpos" in outcome.output
    assert "does not reproduce" not in outcome.output
    assert "d4rl, mujoco-py not installed" in outcome.output and "not available" in outcome.output
    errors = measure(hopper, "hopper")
    assert errors["gymnasium-v4"] < (1e-10, 1e-5)
    assert errors["gymnasium-v5"][0] < 1e-10 and errors["gymnasium-v5"][1] == pytest.approx(1)  # no reward for the last step
    assert errors["d4rl-compat"][0] > 1e-3


def test_data_of_the_old_physics_are_recognised(hopper):
    arrays = dict(read_dataset(hopper).arrays)
    environment = environment_spec("hopper", "d4rl-compat").make()
    environment.reset(seed=0)
    data = environment.unwrapped.data
    for row in range(0, 1000, 2):  # episodes of two rows: a start, and what follows
        environment.reset()
        arrays["infos/qpos"][row], arrays["infos/qvel"][row] = data.qpos, data.qvel
        arrays["rewards"][row] = environment.step(arrays["actions"][row])[1]
        arrays["infos/qpos"][row + 1], arrays["infos/qvel"][row + 1] = data.qpos, data.qvel
    arrays["terminals"] = np.zeros(1000, bool)
    arrays["timeouts"] = np.arange(1000) % 2 == 1
    raw = RawDataset("old", None, arrays, {})
    steps, errors = check_dynamics(raw, "hopper", rows=100, seed=0)
    closest = find_closest(errors)
    assert closest.simulator.startswith("d4rl-compat") and closest.state.max() < 1e-10 and closest.reward.max() < 1e-5
    assert steps.is_exact


def test_states_from_observations_do_where_nothing_else_is_there(hopper):
    raw = read_dataset(hopper)
    arrays = {key: values for key, values in raw.arrays.items() if not key.startswith("infos/")}
    steps, errors = check_dynamics(RawDataset("x", None, arrays, {}), "hopper", rows=150, seed=0)
    assert not steps.is_exact
    assert find_closest(errors).simulator.startswith("gymnasium-v4") and find_closest(errors).state.max() < 1e-3


def test_maze_data_are_recognised(dataset):
    errors = measure(Path(os.environ["D4RL_DATASET_DIR"]) / f"{DATASET}.hdf5", "maze2d-umaze")
    assert errors["dydiff-maze2d"] == (0, 0)


def test_what_cannot_be_replayed(command, hopper, tmp_path):
    np.savez(tmp_path / "other.npz", **make_arrays())
    outcome = command("data", "check-dynamics", tmp_path / "other.npz", "--environment=hopper")
    assert outcome.status == 0 and "which does not reproduce the data either" in outcome.output
    outcome = command("data", "check-dynamics", hopper, "--environment=walker2d")
    assert outcome.status == 1 and "walker2d needs" in outcome.errors
    assert "at least 1" in command("data", "check-dynamics", hopper, "--rows=0").errors
    check_usage(command("data", "check-dynamics", hopper, "--seed=-1"), "--seed", "-1")
    np.savez(tmp_path / "x.npz", **make_arrays())
    assert "--environment" in command("data", "check-dynamics", tmp_path / "x.npz").errors
    np.savez(tmp_path / "x.npz", observations=np.zeros((3, 11)))
    outcome = command("data", "check-dynamics", tmp_path / "x.npz", "--environment=hopper")
    assert outcome.status == 1 and "actions is missing" in outcome.errors
    outcome = command("data", "check-dynamics", tmp_path / "x.npz", "--environment=antmaze-umaze")
    assert outcome.status == 1
