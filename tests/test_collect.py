"""Locally collected datasets: D4RL's schema, maze2d's statistics, the same arrays for the same seed, early refusals."""

import numpy as np
import pytest
from conftest import check_refusal

from dydiff.collecting import collect as collecting
from dydiff.collecting.collect import _policies_of, collect, collect_arrays
from dydiff.data import load_dataset, make_transitions
from dydiff.data.d4rl import LOCAL_DATASETS
from dydiff.environments import environment_spec
from dydiff.environments.maze import free_cells, goal_cell
from dydiff.environments.simulate import roll_out_simulator
from dydiff.errors import DydiffError


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
    with pytest.raises(DydiffError, match="hopper-full-replay-local.* such as hopper-medium-replay-local, .*data list local"):
        collect("hopper-full-replay-local", steps=10, seed=0)
    with pytest.raises(DydiffError, match="at least 2 steps"):
        collect_arrays("hopper-random-local", steps=1, seed=0)
    with pytest.raises(DydiffError, match="at least 0, not -1"):
        collect_arrays("hopper-random-local", steps=10, seed=-1)


@pytest.mark.parametrize("place", ["folder.hdf5", "file/below.hdf5", "/proc/dydiff/a.hdf5"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "folder.hdf5").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(collecting, "collect_arrays", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(DydiffError, match="Cannot write the dataset .*choose another path"):
        collect("hopper-random-local", steps=100, seed=0, path=tmp_path / place, progress=False)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder.hdf5"]


def test_a_refused_collection_leaves_an_older_file_alone(tmp_path):
    path = collect("hopper-random-local", steps=50, seed=0, path=tmp_path / "a.hdf5", progress=False)
    before = path.read_bytes()
    with pytest.raises(DydiffError, match="at least 2 steps"):
        collect("hopper-random-local", steps=1, seed=0, path=path, progress=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [".", "..", "noext", "a.txt"])
def test_a_name_that_could_not_be_loaded_is_refused_before_the_work(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command("collect", "maze2d-umaze-local", "--steps=20", "--path", place)
    check_refusal(outcome, f"'{place}'", "must have a name that ends in one of .hdf5, .h5, .npz")
    assert not list(tmp_path.iterdir())


# A file that is there


@pytest.fixture
def at_work(monkeypatch) -> list[tuple]:
    """The arguments of every recording that began."""
    begun, record = [], collecting.collect_arrays

    def recorded(*arguments):
        begun.append(arguments)
        return record(*arguments)

    monkeypatch.setattr(collecting, "collect_arrays", recorded)
    return begun


@pytest.mark.parametrize(
    "change, told",
    [
        (["--steps=50"], "with another steps (60, not 50)"),
        (["--steps=60", "--seed=1"], "with another seed (0, not 1)"),
        (["another"], "with another environment, "),
    ],
)
def test_a_file_is_replaced_only_by_force(command, change, told, tmp_path, monkeypatch, at_work):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert command("collect", "maze2d-umaze-local", "--steps=60").status == 0
    file = tmp_path / "maze2d-umaze-local.hdf5"
    before, asked = file.read_bytes(), ["maze2d-umaze-local", *change]
    if change == ["another"]:  # the place is taken by another dataset
        asked = ["hopper-random-local", "--steps=60", f"--path={file}"]
    check_refusal(command("collect", *asked), f"'{file}' exists, made {told}", "Give another --path, or --force to replace it")
    assert file.read_bytes() == before and len(at_work) == 1
    assert command("collect", *asked, "--force").status == 0
    assert file.read_bytes() != before


def test_what_is_there_already_is_not_collected_again(command, tmp_path, at_work):
    """So that the quickstart can be repeated in its folder."""
    for name in ("maze2d-umaze-local", "hopper-medium-local", "hopper-medium-expert-local"):
        for suffix in (".hdf5", ".npz"):
            file = tmp_path / f"{name}{suffix}"
            again = ["collect", name, "--steps=60", "--seed=3", f"--path={file}"]
            assert command(*again).status == 0
            before = file.read_bytes()
            at_work.clear()
            outcome = command(*again)
            assert outcome.status == 0 and "Already there" in outcome.output and f"Dataset: {file}" in outcome.output
            assert not at_work and file.read_bytes() == before


def test_no_file_of_others_is_replaced(tmp_path):
    file = tmp_path / "a.hdf5"
    file.write_text("precious")
    with pytest.raises(DydiffError, match="exists, made by something else. .*--force"):
        collect("hopper-random-local", steps=20, seed=0, path=file, progress=False)
    assert file.read_text() == "precious"


def test_every_dataset_tells_itself_from_the_others():
    told = [collecting._describe(collecting._spec_of(name), _policies_of(name), 100, 0) for name in LOCAL_DATASETS]
    assert all(told.count(metadata) == 1 for metadata in told)
