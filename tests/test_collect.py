"""Locally collected datasets: D4RL's schema, maze2d's statistics, the same arrays for the same seed, early refusals."""

import numpy as np
import pytest

import dydiff.collect
from dydiff.collect import LOCAL_DATASETS, collect, collect_arrays
from dydiff.data import load_dataset, make_transitions
from dydiff.environments import environment_spec
from dydiff.errors import DydiffError
from dydiff.maze import free_cells, goal_cell
from dydiff.simulate import roll_out_simulator


@pytest.fixture(scope="module")
def umaze():
    return collect_arrays("maze2d-umaze-local", steps=20000, seed=0)


def test_umaze_has_the_published_statistics(umaze):
    ends = np.flatnonzero(umaze["timeouts"])
    segments = np.diff(np.concatenate(([-1], ends)))
    assert 74 < segments.mean() < 86  # published: 80.26
    assert segments.max() <= 301
    assert not umaze["terminals"].any()
    assert np.abs(umaze["observations"][:, 2:]).max() < 5.3
    assert np.abs(umaze["actions"]).max() <= 1.0


def test_umaze_segments_end_at_their_targets(umaze):
    ends = np.flatnonzero(umaze["timeouts"])
    targets = umaze["infos/goal"][ends].round()
    assert {tuple(cell) for cell in targets.astype(int).tolist()} == set(free_cells("umaze"))
    distance = np.linalg.norm(umaze["observations"][ends, :2] - targets, axis=1)
    assert np.mean(distance < 0.1) > 0.99
    inner = ends[ends + 1 < len(umaze["observations"])]
    np.testing.assert_array_equal(umaze["observations"][inner], umaze["observations"][inner + 1])


def test_umaze_reward_belongs_to_its_row(umaze):
    distance = np.linalg.norm(umaze["observations"][:, :2] - goal_cell("umaze"), axis=1)
    np.testing.assert_array_equal(umaze["rewards"], distance <= 0.5)
    assert 0 < umaze["rewards"].mean() < 0.5


def test_umaze_rows_are_the_simulators(umaze):
    following = roll_out_simulator(
        environment_spec("maze2d-umaze"),
        umaze["infos/qpos"][:50],
        umaze["infos/qvel"][:50],
        horizon=2,
        actions=np.stack((umaze["actions"][:50], umaze["actions"][1:51]), axis=1),
    )
    state = np.concatenate((umaze["infos/qpos"], umaze["infos/qvel"]), axis=1)
    np.testing.assert_allclose(following.observation[:, 1], state[1:51], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOCAL_DATASETS)
def test_same_seed_same_arrays(name):
    first, again, other = (collect_arrays(name, steps=300, seed=seed) for seed in (1, 1, 2))
    assert first.keys() == again.keys()
    for key, values in first.items():
        assert len(values) == 300
        assert values.dtype == again[key].dtype and values.tobytes() == again[key].tobytes(), key
    assert not np.array_equal(first["actions"], other["actions"])


def test_file_is_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = collect("maze2d-umaze-local", steps=500, seed=4, progress=False)
    assert path.parent == tmp_path
    dataset = load_dataset("maze2d-umaze-local")
    assert len(dataset) == 500
    assert dataset.environment == "maze2d-umaze"
    assert {"source", "environment", "backend", "mujoco_version", "seed", "steps", "recipe"} <= set(dataset.metadata)
    assert (dataset.metadata["seed"], dataset.metadata["backend"]) == (4, "dydiff-maze2d")
    kept = make_transitions(dataset)
    assert len(kept.observation) == 499 - dataset.timeouts[:-1].sum()
    elsewhere = collect("maze2d-umaze-local", steps=500, seed=4, path=tmp_path / "mine.hdf5", progress=False)
    assert load_dataset(str(elsewhere)).fingerprint == dataset.fingerprint


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(DydiffError, match="hopper-full-replay-local.*maze2d-umaze-local.*hopper-random-local"):
        collect("hopper-full-replay-local", steps=10, seed=0)
    with pytest.raises(DydiffError, match="at least 2 steps"):
        collect_arrays("hopper-random-local", steps=1, seed=0)
    with pytest.raises(DydiffError, match="at least 0, not -1"):
        collect_arrays("hopper-random-local", steps=10, seed=-1)


@pytest.mark.parametrize("place", ["folder", "file/below.hdf5", "/proc/dydiff/a.hdf5"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(dydiff.collect, "collect_arrays", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(DydiffError, match="Cannot write the dataset .*choose another path"):
        collect("hopper-random-local", steps=100, seed=0, path=tmp_path / place, progress=False)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_refused_collection_leaves_an_older_file_alone(tmp_path):
    path = collect("hopper-random-local", steps=50, seed=0, path=tmp_path / "a.hdf5", progress=False)
    before = path.read_bytes()
    with pytest.raises(DydiffError, match="at least 2 steps"):
        collect("hopper-random-local", steps=1, seed=0, path=path, progress=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
