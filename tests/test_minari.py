"""Datasets of other packages: Minari's, and those that only the legacy d4rl package knows; both with stand-ins for them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from dydiff.data import legacy_reader, load_dataset, normalized_score
from dydiff.errors import DydiffError
from dydiff.problem import load_problem

MINARI_ID = "mujoco/hopper/medium-v0"


def make_episode(steps, width=11, terminated=False, truncated=False, seed=0, entries=None):
    generator = np.random.default_rng(seed)
    observations = generator.normal(size=(steps + 1, width))
    return SimpleNamespace(
        observations=observations if entries is None else {key: observations[:, part] for key, part in entries.items()},
        actions=generator.uniform(-1, 1, (steps, 3)).astype(np.float32),
        rewards=generator.normal(size=steps),
        terminations=np.arange(steps) == (steps - 1 if terminated else -1),
        truncations=np.arange(steps) == (steps - 1 if truncated else -1),
    )


@pytest.fixture
def minari(monkeypatch):
    """A stand-in for the package, with two datasets."""
    episodes = [make_episode(5, terminated=True, seed=1), make_episode(4, truncated=True, seed=2), make_episode(3, seed=3)]
    parts = {"observation": slice(2, 6), "achieved_goal": slice(0, 2)}
    sets = {
        MINARI_ID: ("Hopper-v5", episodes),
        "D4RL/pointmaze/umaze-v2": ("PointMaze_UMaze-v3", [make_episode(4, 6, entries=parts)]),
        "my/empty-v0": (None, []),
    }
    here = set(sets)

    def load(minari_id, download):
        if minari_id not in sets:
            raise ValueError("no such dataset")
        if minari_id not in here and not download:
            raise FileNotFoundError(minari_id)
        here.add(minari_id)
        environment, episodes = sets[minari_id]
        spec = SimpleNamespace(env_spec=SimpleNamespace(id=environment) if environment else None)
        return SimpleNamespace(spec=spec, iterate_episodes=lambda: iter(episodes))

    module = ModuleType("minari")
    module.__version__, module.load_dataset, module.here, module.episodes = "0.0", load, here, episodes
    module.list_local_datasets = lambda: {name: {} for name in here}
    monkeypatch.setitem(sys.modules, "minari", module)
    return module


def test_minari_becomes_d4rls_schema(minari):
    dataset = load_dataset(MINARI_ID)
    assert len(dataset) == 12
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminals), [4])
    np.testing.assert_array_equal(np.flatnonzero(dataset.timeouts), [8, 11])  # the last episode just stops
    second = minari.episodes[1]
    np.testing.assert_allclose(dataset.observations[5:9], second.observations[:-1], rtol=1e-6)
    np.testing.assert_allclose(dataset.next_observations[5:9], second.observations[1:], rtol=1e-6)
    np.testing.assert_allclose(dataset.rewards[5:9], second.rewards, rtol=1e-6)
    assert (dataset.environment, dataset.backend) == ("hopper", "gymnasium-v5")
    assert load_problem(MINARI_ID).simulator.startswith("gymnasium-v5")
    assert normalized_score(MINARI_ID, 3484.0) is None  # D4RL's reference returns are not for these data


def test_minari_data_cannot_pass_for_d4rl(command, minari, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    target = tmp_path / "hopper_medium-v2.hdf5"
    assert command("data", "convert", MINARI_ID, target).status == 0
    with pytest.raises(DydiffError, match="made by `Minari`, so it is not the D4RL dataset"):
        load_dataset("hopper-medium-v2")
    assert load_dataset(target).fingerprint == load_dataset(MINARI_ID).fingerprint


def test_minari_dictionaries_become_vectors(minari):
    dataset = load_dataset("D4RL/pointmaze/umaze-v2")
    assert dataset.observation_dim == 6 and dataset.environment == "PointMaze_UMaze-v3" and dataset.backend is None
    np.testing.assert_allclose(dataset.observations, make_episode(4, 6).observations[:-1], rtol=1e-6)  # alphabetical


def test_minari_failures(command, minari, monkeypatch):
    assert f"\n{MINARI_ID} " in command("data", "list", "hopper").output
    minari.here.clear()
    assert MINARI_ID not in command("data", "list").output
    with pytest.raises(DydiffError, match=f"dydiff data download {MINARI_ID}"):
        load_dataset(MINARI_ID)
    assert command("data", "download", MINARI_ID).status == 0
    assert len(load_dataset(MINARI_ID)) == 12
    with pytest.raises(DydiffError, match="holds no steps"):
        load_dataset("my/empty-v0", download=True)
    with pytest.raises(DydiffError, match="no such dataset"):
        load_dataset("my/other-v0")
    assert "no such dataset" in command("data", "download", "my/other-v0").errors
    minari.here.add(MINARI_ID)
    minari.episodes[0].observations = np.array([["text"]] * 6)
    with pytest.raises(DydiffError, match="are not numbers"):
        load_dataset(MINARI_ID)
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DydiffError, match=r"dydiff\[minari\].*must end in .hdf5"):
        load_dataset(MINARI_ID)


@pytest.mark.filterwarnings("ignore::UserWarning")  # it wants to know the author
def test_minari_itself(monkeypatch, tmp_path):
    """The stand-in says what the package does, where that is installed."""
    minari = pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = [make_episode(5, terminated=True, seed=1), make_episode(4, truncated=True, seed=2)]
    buffers = [
        EpisodeBuffer(
            id=number,
            observations=list(episode.observations),
            actions=list(episode.actions),
            rewards=episode.rewards.tolist(),
            terminations=episode.terminations.tolist(),
            truncations=episode.truncations.tolist(),
            infos=None,
        )
        for number, episode in enumerate(episodes)
    ]
    minari.create_dataset_from_buffers(
        "my/hopper/test-v0",
        buffer=buffers,
        env="Hopper-v5",
        observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
        action_space=spaces.Box(-1, 1, (3,), np.float32),
    )
    dataset = load_dataset("my/hopper/test-v0")
    expected = np.concatenate([episode.observations[1:] for episode in episodes])
    np.testing.assert_allclose(dataset.next_observations, expected, rtol=1e-6)
    assert (len(dataset), dataset.environment, dataset.backend) == (9, "hopper", "gymnasium-v5")
    with pytest.raises(DydiffError, match="dydiff data download my/hopper/other-v0"):
        load_dataset("my/hopper/other-v0")


# The legacy package

ARRAYS = {
    "observations": np.zeros((9, 5)),
    "actions": np.linspace(-1, 1, 18, dtype=np.float32).reshape(9, 2),
    "rewards": np.arange(9),
    "terminals": np.zeros(9, bool),
    "timeouts": np.arange(9) == 8,
}


@pytest.fixture
def legacy(monkeypatch):
    def make(name):
        if name != "pen-human-v1":
            raise ValueError(f"{name} is not registered")
        values = {**ARRAYS, "metadata/algorithm": b"demonstrations", "metadata/weight": np.zeros((2, 2))}
        return SimpleNamespace(get_dataset=lambda: values, close=lambda: None)

    gym = ModuleType("gym")
    gym.make = make
    monkeypatch.setitem(sys.modules, "gym", gym)
    monkeypatch.setitem(sys.modules, "d4rl", ModuleType("d4rl"))


def test_names_that_only_the_legacy_package_knows(legacy):
    dataset = load_dataset("pen-human-v1")
    np.testing.assert_array_equal(dataset.actions, ARRAYS["actions"])
    assert dataset.metadata == {"source": "d4rl package", "algorithm": "demonstrations"}
    with pytest.raises(DydiffError, match="Unknown dataset 'pen-humn-v1'.*is not registered"):
        load_dataset("pen-humn-v1")


def test_broken_legacy_package_is_passed_over(monkeypatch):
    def fail(name):
        raise Exception("You appear to be missing MuJoCo")

    monkeypatch.setattr(legacy_reader.importlib, "import_module", fail)
    told = "'pen-human-v1' needs the legacy package d4rl, .* .Exception: You appear to be missing MuJoCo.: .* older Python"
    with pytest.raises(DydiffError, match=told):
        load_dataset("pen-human-v1")
