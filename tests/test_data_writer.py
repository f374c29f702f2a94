"""Writing datasets: D4RL's schema, and whole files or none."""

import h5py
import numpy as np
import pytest

from dydiff.data import load_dataset, write_dataset, writer
from dydiff.errors import DydiffError


def make_arrays(rows: int = 20) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {
        "observations": generator.standard_normal((rows, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": generator.standard_normal(rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 5 == 4,
        "infos/qpos": generator.standard_normal((rows, 2)),
        "infos/qvel": generator.standard_normal((rows, 2)),
    }


def test_round_trip_in_d4rl_schema(tmp_path):
    arrays, metadata = make_arrays(), {"environment": "maze2d-umaze", "seed": 3, "noise": 0.5, "dense": False}
    path = write_dataset(tmp_path / "new" / "folder" / "a.hdf5", arrays, metadata)
    with h5py.File(path) as file:
        assert not file.attrs
        for key, values in arrays.items():
            assert file[key].compression == "gzip" and file[key].dtype == values.dtype
            np.testing.assert_array_equal(file[key][()], values)
        assert file["metadata/environment"][()] == b"maze2d-umaze"
    dataset = load_dataset(path)
    assert dataset.metadata == metadata
    np.testing.assert_array_equal(dataset.observations, arrays["observations"])
    assert [entry.name for entry in path.parent.iterdir()] == ["a.hdf5"]


def test_refuses_what_the_reader_would_refuse(tmp_path):
    arrays = make_arrays()
    del arrays["actions"]
    with pytest.raises(DydiffError, match="lacks actions"):
        write_dataset(tmp_path / "a.hdf5", arrays, {})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "a.hdf5", make_arrays(), {"seed": 1})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(writer.os, "replace", fail)
    with pytest.raises(DydiffError, match="disk full"):
        write_dataset(path, make_arrays(40), {"seed": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_equal_content_gives_equal_bytes(tmp_path):
    first = write_dataset(tmp_path / "a.hdf5", make_arrays(), {"seed": 1}).read_bytes()
    assert write_dataset(tmp_path / "b.hdf5", make_arrays(), {"seed": 1}).read_bytes() == first
