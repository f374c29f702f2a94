"""Reading datasets: what is accepted, what is refused and in which words, names and scores."""

import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import refusal

from dydiff.data import Dataset, d4rl, dataset_from_arrays, dataset_path, files, load_dataset, normalized_score
from dydiff.data.d4rl import local_names
from dydiff.data.dataset import find_breaks
from dydiff.errors import DydiffError

ROWS = 12


def make_arrays(rows: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    timeouts = np.zeros(rows, bool)
    timeouts[-1] = True
    return {
        "observations": generator.standard_normal((rows, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": generator.standard_normal(rows).astype(np.float32),
        "terminals": np.arange(rows) == 4,
        "timeouts": timeouts,
        "next_observations": generator.standard_normal((rows, 3)).astype(np.float32),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    return tmp_path


def test_reads_a_current_file_with_infos_and_policy_weights(cache):
    arrays = make_arrays()
    extra = {
        "infos/qpos": np.zeros((ROWS, 6)),
        "infos/action_log_probs": np.zeros(ROWS),
        "metadata/algorithm": np.bytes_("SAC"),
        "metadata/iteration": np.int64(600),
        "metadata/policy/fc0/weight": np.zeros((4, 3)),
        "metadata/policy/nonlinearity": "relu",
        "metadata/policy/broken": np.bytes_(b"\xff"),
    }
    write(cache / "hopper_medium-v2.hdf5", {**arrays, **extra})
    dataset = load_dataset("hopper-medium-v2")
    for key, values in arrays.items():
        np.testing.assert_array_equal(getattr(dataset, key), values)
        assert getattr(dataset, key).dtype == values.dtype
    assert (len(dataset), dataset.observation_dim, dataset.action_dim) == (ROWS, 3, 2)
    assert (dataset.name, dataset.environment) == ("hopper-medium-v2", "hopper")
    assert dataset.metadata == {
        "algorithm": "SAC",
        "iteration": 600,
        "policy/nonlinearity": "relu",
        "policy/broken": "\ufffd",
    }


@pytest.mark.parametrize("width", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("flag", [bool, np.uint8, np.int64, np.float64])
def test_reads_old_files_of_any_width(tmp_path, width, flag):
    arrays = make_arrays()
    old = {key: arrays[key].astype(width) for key in ("observations", "actions")}
    old["rewards"] = arrays["rewards"].astype(width)[:, None]
    old["terminals"] = arrays["terminals"].astype(flag)
    dataset = load_dataset(write(tmp_path / "old.h5", old))
    assert dataset.observations.dtype == dataset.rewards.dtype == np.float32
    assert dataset.rewards.shape == (ROWS,)
    np.testing.assert_array_equal(dataset.observations, arrays["observations"].astype(width).astype(np.float32))
    np.testing.assert_array_equal(dataset.terminals, arrays["terminals"])
    assert dataset.terminals.dtype == bool
    assert dataset.timeouts is None and dataset.next_observations is None and dataset.environment is None


def test_reads_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **make_arrays(), **{"metadata/environment": "walker2d", "metadata/steps": 12})
    dataset = load_dataset(str(path))
    assert dataset.metadata == {"environment": "walker2d", "steps": 12}
    assert (dataset.name, dataset.environment) == ("mine.npz", "walker2d")
    np.testing.assert_array_equal(dataset.observations, make_arrays()["observations"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": None}, r"lacks actions; it holds next_observations, observations, rewards, terminals, timeouts"),
        ({"rewards": None, "terminals": None}, r"lacks rewards, terminals"),
        ({"observations": np.zeros(ROWS)}, r"observations has shape \(12,\), but must be a matrix"),
        ({"actions": np.zeros((ROWS, 0))}, r"actions has shape \(12, 0\).* at least one column"),
        ({"rewards": np.zeros((ROWS, 2))}, r"rewards has shape \(12, 2\), but must hold one number per step"),
        ({"actions": np.zeros((ROWS - 1, 2))}, r"actions has 11 rows but observations has 12"),
        ({"timeouts": np.zeros(ROWS + 1, bool)}, r"timeouts has 13 rows but observations has 12"),
        ({"next_observations": np.zeros((ROWS, 4))}, r"next_observations has shape \(12, 4\) but observations"),
        ({"observations": np.diag([0.0, 0, np.nan] + [0] * 9)}, r"observations holds NaN .* in 1 of 12 .* row 2"),
        ({"rewards": np.where(np.arange(12) >= 9, np.inf, 0)}, r"rewards holds NaN or infinite .* 3 of 12 .* row 9"),
        ({"actions": np.full((ROWS, 2), 1e300)}, r"actions holds NaN or infinite numbers in 12 of 12"),
        ({"terminals": np.full(ROWS, 0.5)}, r"terminals must hold flags .* row 0 holds 0\.5"),
        ({"terminals": np.full(ROWS, np.nan)}, r"terminals holds NaN"),
        ({"actions": np.full((ROWS, 2), b"x")}, r"actions holds \|S1 values, but must hold real numbers"),
        ({key: values[:1] for key, values in make_arrays().items()}, r"has 1 rows of observations"),
    ],
)
def test_refuses_bad_content_by_name(tmp_path, change, words):
    arrays = {key: values for key, values in {**make_arrays(), **change}.items() if values is not None}
    path = write(tmp_path / "bad.hdf5", arrays)
    with pytest.raises(DydiffError, match=words) as caught:
        load_dataset(path)
    assert str(path) in str(caught.value)


def test_refuses_broken_files(tmp_path):
    missing = tmp_path / "none.hdf5"
    with pytest.raises(DydiffError, match="There is no dataset file"):
        load_dataset(missing)
    page = tmp_path / "page.hdf5"
    page.write_text("<html>404</html>")
    with pytest.raises(DydiffError, match="is not an HDF5 file"):
        load_dataset(page)
    page.write_bytes(b"")
    with pytest.raises(DydiffError, match="is not an HDF5 file"):
        load_dataset(page)
    cut = write(tmp_path / "cut.hdf5", make_arrays(3000))
    cut.write_bytes(cut.read_bytes()[:-20000])
    with pytest.raises(DydiffError, match="truncated or damaged"):
        load_dataset(cut)


def test_refuses_damaged_compressed_rows(tmp_path):
    path = tmp_path / "damaged.hdf5"
    arrays = make_arrays(4000)
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, compression="gzip")
        chunk = file["observations"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with pytest.raises(DydiffError, match="truncated or damaged"):
        load_dataset(path)


def test_a_crash_of_the_library_that_reads_is_told(tmp_path, monkeypatch):
    """As HDF5 2.0 does on some damaged files: the process that reads dies, ours goes on."""
    path = write(tmp_path / "deadly.hdf5", make_arrays())
    visit = files._visit_hdf5

    def crash(path, wanted):
        yield next(visit(path, wanted))
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(files, "_visit_hdf5", crash)
    handles = os.listdir("/proc/self/fd")
    with pytest.raises(DydiffError, match="deadly.hdf5.*damaged .HDF5 says: reading it ended by SIGSEGV"):
        load_dataset(path)
    assert os.listdir("/proc/self/fd") == handles


def test_refuses_npz_that_is_not_an_archive_of_plain_arrays(tmp_path):
    path = tmp_path / "bad.npz"
    for content in (b"", b"no archive", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(DydiffError, match="cannot be read as a NumPy archive"):
            load_dataset(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DydiffError, match="single array"):
        load_dataset(path)
    np.savez(path, **{**make_arrays(), "observations": np.array([[object()]])})
    with pytest.raises(DydiffError, match="cannot be read as a NumPy archive"):
        load_dataset(path)


def test_missing_d4rl_file_says_what_to_do(cache):
    with pytest.raises(DydiffError) as caught:
        load_dataset("hopper-medium-expert-v2")
    for part in (
        "'hopper_medium_expert-v2.hdf5'",
        str(cache),
        "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/hopper_medium_expert-v2.hdf5",
        "D4RL_DATASET_DIR",
        "path of a .hdf5, .h5 or .npz",
    ):
        assert part in str(caught.value)


def test_missing_local_file_names_the_collector(cache):
    with pytest.raises(DydiffError, match="dydiff collect maze2d-umaze-local") as caught:
        load_dataset("maze2d-umaze-local")
    assert "rail.eecs" not in str(caught.value) and "'maze2d-umaze-local.hdf5'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("hopper-medium-v3", "hopper-medium-v2"),
        ("hopper-full-replay-v0", "hopper-full-replay-v"),
        ("hopper-medium-replay-locl", "hopper-medium-replay-local"),
        ("maze2d-umaze-locale", "maze2d-umaze-local"),
        ("nonsense-local", "-local"),
        ("../hopper-local", "dataset"),
        ("", "hopper-medium-v2"),
    ],
)
def test_unknown_name_tells_the_nearest(name, nearest):
    with pytest.raises(DydiffError, match="Unknown dataset") as caught:
        load_dataset(name)
    assert nearest in str(caught.value)


def test_a_local_name_without_a_recipe_is_not_told_to_be_made(cache):
    write(cache / "hopper-mine-local.hdf5", make_arrays())
    with pytest.raises(DydiffError, match="has no recipe for it; the nearest names are hopper-mine-local, ") as caught:
        load_dataset("hopper-mina-local")
    assert "Make it" not in str(caught.value) and "hopper-mine-local" in local_names()


def test_local_data_cannot_pass_for_d4rl(cache):
    arrays = {**make_arrays(), "metadata/source": "dydiff collect", "metadata/environment": "maze2d-umaze"}
    stand_in = write(cache / "maze2d-umaze-sparse-v1.hdf5", arrays)
    with pytest.raises(DydiffError, match="is not the D4RL dataset 'maze2d-umaze-v1'"):
        load_dataset("maze2d-umaze-v1")
    by_path = load_dataset(stand_in)
    assert by_path.environment == "maze2d-umaze" and normalized_score(by_path.name, 100.0) is None
    write(cache / "maze2d-umaze-local.hdf5", arrays)
    local = load_dataset("maze2d-umaze-local")
    assert normalized_score(local.name, 100.0) is None


@pytest.mark.parametrize(
    ("name", "file", "environment"),
    [
        ("hopper-medium-v2", "hopper_medium-v2.hdf5", "hopper"),
        ("ant-full-replay-v1", "ant_full_replay-v1.hdf5", "ant"),
        ("walker2d-medium-replay-v0", "walker_mixed.hdf5", "walker2d"),
        ("halfcheetah-medium-expert-v0", "halfcheetah_medium_expert.hdf5", "halfcheetah"),
        ("maze2d-umaze-v1", "maze2d-umaze-sparse-v1.hdf5", "maze2d-umaze"),
        ("maze2d-large-dense-v1", "maze2d-large-dense-v1.hdf5", "maze2d-large-dense"),
        (
            "antmaze-large-play-v2",
            "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
            "antmaze-large",
        ),
        (
            "antmaze-umaze-v0",
            "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
            "antmaze-umaze",
        ),
        ("hopper-random-local", "hopper-random-local.hdf5", "hopper"),
    ],
)
def test_names_give_files_and_environments(cache, name, file, environment):
    assert dataset_path(name) == cache / file
    assert d4rl.environment_of(name) == d4rl.environment_of(file) == environment


def test_cache_folder_defaults_to_home(monkeypatch):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert dataset_path("hopper-medium-v2") == Path.home() / ".d4rl" / "datasets" / "hopper_medium-v2.hdf5"


def test_every_d4rl_name_has_a_score_a_limit_and_its_own_file():
    assert len({path.rsplit("/", 1)[-1] for path in d4rl.FILES.values()}) == len(d4rl.FILES)
    for name in d4rl.FILES:
        environment = d4rl.environment_of(name)
        random_return, expert_return = d4rl.REFERENCE_RETURNS[environment]
        assert d4rl.max_episode_steps(environment) in (300, 600, 700, 800, 1000)
        assert normalized_score(name, random_return) == 0.0
        assert normalized_score(name, expert_return) == pytest.approx(100.0)
    assert normalized_score("hopper-medium-v2", 1422.0) == pytest.approx(44.316, abs=1e-3)


def test_environment_prefers_metadata():
    arrays = make_arrays()
    assert dataset_from_arrays(arrays, "hopper-medium-v2", metadata={"environment": "ant"}).environment == "ant"
    assert dataset_from_arrays(arrays, "x", metadata={"environment": "Walker2d-v4"}).environment == "walker2d"
    assert dataset_from_arrays(arrays, "x", metadata={"environment": "my-robot"}).environment == "my-robot"


def test_an_environments_version_names_the_simulator():
    versions = ("Walker2d-v5", "Walker2d-v4", "walker2d")
    made = [dataset_from_arrays(make_arrays(), "x", metadata={"environment": version}) for version in versions]
    assert [dataset.backend for dataset in made] == ["gymnasium-v5", None, None]


def test_fingerprint_depends_on_every_array_and_nothing_else():
    arrays = make_arrays()
    reference = dataset_from_arrays(arrays, "a").fingerprint
    assert len(reference) == 64
    assert dataset_from_arrays(arrays, "b", metadata={"x": 1}).fingerprint == reference
    fingerprints = {reference}
    for key, values in arrays.items():
        changed = values.copy()
        changed.flat[0] = ~changed.flat[0] if changed.dtype == bool else changed.flat[0] + 1
        fingerprints.add(dataset_from_arrays({**arrays, key: changed}, "a").fingerprint)
    for left_out in (["next_observations"], ["next_observations", "timeouts"]):
        fingerprints.add(dataset_from_arrays({k: v for k, v in arrays.items() if k not in left_out}, "a").fingerprint)
    assert len(fingerprints) == 1 + len(arrays) + 2


@pytest.mark.parametrize("name, breaks", [("walker2d-x", [3, 7, 10]), ("unknown", [3, 7, 10]), ("walker2d-x", [])])
def test_episodes_without_timeouts_are_not_glued_together(name, breaks):
    arrays = make_arrays()
    del arrays["timeouts"]
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    arrays["next_observations"][[4, *breaks]] += 1  # the terminal row's is its own
    if not breaks:
        assert len(dataset_from_arrays(arrays, name)) == ROWS
        return
    message = refusal(dataset_from_arrays, arrays, name)
    assert "no timeouts, but 3 episode(s) end within it, first in row 3, " in message and "Store a timeouts array" in message
    assert find_breaks(arrays, None).tolist() == breaks
    assert find_breaks(arrays, 5).tolist() == [7, 10], "the first episode may have ended by the limit"


def test_fingerprint_tells_equal_bytes_of_other_shapes_apart():
    flat = {"rewards": np.zeros(4), "terminals": np.zeros(4)}
    wide = dataset_from_arrays({**flat, "observations": np.zeros((4, 2)), "actions": np.zeros((4, 1))}, "a")
    narrow = dataset_from_arrays({**flat, "observations": np.zeros((4, 1)), "actions": np.zeros((4, 2))}, "a")
    assert wide.fingerprint != narrow.fingerprint


def test_reading_is_vectorised(tmp_path):
    arrays = make_arrays(200_000)
    path = write(tmp_path / "large.hdf5", arrays)
    start = time.perf_counter()
    dataset = load_dataset(path)
    assert isinstance(dataset, Dataset) and len(dataset.fingerprint) == 64
    # Row by row in Python it would take many times as long; the limit leaves room for a busy machine.
    assert time.perf_counter() - start < 2.0
