"""Locomotion with the shipped policies: whole episodes, rows that are the simulator's, and the same for any number of processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dydiff.collecting.behaviour import shipped_policies
from dydiff.collecting.collect import POLICIES, collect, collect_arrays
from dydiff.data import load_dataset, read_dataset
from dydiff.data.d4rl import LOCAL_DATASETS, LOCAL_LOCOMOTION
from dydiff.environments import environment_spec
from dydiff.environments.simulate import roll_out_simulator


def test_every_name_has_its_recipe():
    named = {name.removesuffix("-local").partition("-")[2] for name, by in LOCAL_DATASETS.items() if by in LOCAL_LOCOMOTION}
    assert named == POLICIES.keys()


@pytest.fixture(scope="module")
def replay():
    """Rows of hopper's policies on the way to medium."""
    return collect_arrays("hopper-medium-replay-local", steps=6000, seed=3)


def episode_returns(arrays):
    over = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    return np.array([part.sum() for part in np.split(arrays["rewards"], over[:-1])])


def density_errors(weights, arrays):
    """How far the stored log-densities are off for a policy, in rows whose actions artanh does not magnify rounding of."""
    inner = (np.abs(arrays["actions"]) < 0.99).all(1)
    assert inner.sum() > 100
    features, actions = arrays["observations"][inner], arrays["actions"][inner].astype(np.float64)
    for layer in ("fc0", "fc1"):
        features = np.tanh(features @ weights[f"{layer}/weight"].T + weights[f"{layer}/bias"])
    mean, log_std = (features @ weights[f"{head}/weight"].T + weights[f"{head}/bias"] for head in ("last_fc", "last_fc_log_std"))
    noise = (np.arctanh(actions) - mean) / np.exp(log_std)
    density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log1p(-(actions**2))
    return np.abs(density.sum(1) - arrays["infos/action_log_probs"][inner])


def test_random_hopper_episodes():
    arrays = collect_arrays("hopper-random-local", steps=1000, seed=0)
    over = arrays["terminals"] | arrays["timeouts"]
    assert over[-1] and 15 < np.diff(np.flatnonzero(over)).mean() < 30
    np.testing.assert_allclose(arrays["observations"][:, :5], arrays["infos/qpos"][:, 1:], rtol=1e-6)
    assert np.abs(arrays["actions"]).max() > 0.99 and np.abs(arrays["actions"].mean(0)).max() < 0.1
    np.testing.assert_allclose(arrays["infos/action_log_probs"], -3 * np.log(2), rtol=1e-6)


def test_random_halfcheetah_episodes_time_out():
    arrays = collect_arrays("halfcheetah-random-local", steps=1500, seed=0)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [999, 1499]
    assert not arrays["terminals"].any()


def test_episodes_are_whole(replay):
    over = replay["terminals"] | replay["timeouts"]
    assert not (replay["terminals"] & replay["timeouts"]).any()
    within = np.flatnonzero(~over)
    np.testing.assert_array_equal(replay["next_observations"][within], replay["observations"][within + 1])
    assert np.all(np.any(replay["next_observations"][:-1][over[:-1]] != replay["observations"][1:][over[:-1]], axis=1))
    policies = len(shipped_policies("hopper", "replay-*")) + 1
    ends_of_parts = 6000 * np.arange(1, policies + 1) // policies - 1
    lengths = np.diff(np.flatnonzero(over), prepend=-1)
    early = np.flatnonzero(over)[(lengths < 1000) & ~replay["terminals"][over]]
    assert over[ends_of_parts].all() and set(early) <= set(ends_of_parts)


def test_rows_are_the_simulators(replay):
    rows = slice(3000, 3100)
    again = roll_out_simulator(
        environment_spec("hopper"),
        replay["infos/qpos"][rows],
        replay["infos/qvel"][rows],
        horizon=2,
        actions=np.repeat(replay["actions"][rows][:, None], 2, axis=1),
    )
    np.testing.assert_array_equal(again.observation[:, 0], replay["observations"][rows])
    # An episode's solver starts where its last step ended; set into a state, it starts cold.
    np.testing.assert_allclose(again.observation[:, 1], replay["next_observations"][rows], atol=1e-3)
    np.testing.assert_allclose(again.reward[:, 0], replay["rewards"][rows], atol=1e-3)
    np.testing.assert_array_equal(again.terminal[:, 0], replay["terminals"][rows])


def test_replay_gets_better_and_expert_is_best(replay):
    returns = [episode_returns({key: values[part] for key, values in replay.items()}) for part in (slice(1500), slice(4500, None))]
    expert = episode_returns(collect_arrays("hopper-expert-local", steps=6000, seed=3))
    assert returns[0].mean() < returns[1].mean() < expert.mean()


def test_medium_expert_is_half_and_half():
    arrays = collect_arrays("hopper-medium-expert-local", steps=601, seed=0)
    halves = [{key: values[part] for key, values in arrays.items()} for part in (slice(300), slice(300, None))]
    for half, role, other in zip(halves, ("medium", "expert"), ("expert", "medium"), strict=True):
        (policy,), (another,) = (shipped_policies("hopper", name) for name in (role, other))
        assert half["timeouts"][-1] or half["terminals"][-1]
        np.testing.assert_array_less(density_errors(policy.weights, half), 0.01)
        assert np.median(density_errors(another.weights, half)) > 0.1


def test_fewer_rows_than_policies():
    arrays = collect_arrays("hopper-medium-replay-local", steps=2, seed=0)
    assert all(len(values) == 2 for values in arrays.values())
    assert arrays["timeouts"].all() and not arrays["terminals"].any()


def test_the_number_of_processes_changes_nothing(replay):
    shared = collect_arrays("hopper-medium-replay-local", steps=6000, seed=3, processes=2)
    assert shared.keys() == replay.keys()
    for key, values in replay.items():
        assert values.dtype == shared[key].dtype and values.tobytes() == shared[key].tobytes(), key


@pytest.mark.parametrize("environment", LOCAL_LOCOMOTION)
def test_a_file_tells_what_made_it(environment, tmp_path):
    name = f"{environment}-medium-local"
    path = collect(name, steps=1200, seed=4, path=tmp_path / "a.hdf5", progress=False)
    raw = read_dataset(path)
    assert (raw.metadata["source"], raw.metadata["environment"]) == ("dydiff collect", environment)
    assert "whole episodes of the policy" in raw.metadata["recipe"]
    (facts,) = json.loads(raw.metadata["policies"])
    assert facts["rows"] == 1200 and facts["name"] == f"{environment}-medium" and facts["return_mean"] > 0
    assert raw.metadata["policy/output_distribution"] == "tanh_gaussian"

    weights = {key.removeprefix("metadata/policy/"): values for key, values in raw.arrays.items() if "/policy/" in key}
    np.testing.assert_array_less(density_errors(weights, raw.arrays), 0.01)
    assert "policy/fc0/weight" not in load_dataset(path).metadata


def test_a_local_dataset_is_not_scored_as_d4rl(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    collect("hopper-medium-expert-local", steps=400, seed=0, progress=False)
    dataset = load_dataset("hopper-medium-expert-local")
    assert dataset.backend == "gymnasium-v4"
    assert [facts["rows"] for facts in json.loads(dataset.metadata["policies"])] == [200, 200]
    assert "policy/nonlinearity" not in dataset.metadata


def children_of(process: subprocess.Popen) -> list[int]:
    """The processes that record for it; Python's multiprocessing has one more, which minds shared resources."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def collecting(tmp_path):
    """`dydiff collect` as it records with two processes, long from its end."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds processes in /proc")
    command = [sys.executable, "-m", "dydiff.cli", "collect", "hopper-random-local", "--steps=100000000", "--processes=2"]
    process = subprocess.Popen([*command, f"--path={tmp_path / 'a.hdf5'}"], stderr=subprocess.PIPE, text=True)
    shown = ""
    while not re.search(r"\d[kM]?row/s", shown):  # the first pieces are there
        shown += process.stderr.read(20)
        assert process.poll() is None, shown
    yield process
    process.kill()
    process.communicate()


def test_an_interrupt_ends_all_processes_at_once(collecting, tmp_path):
    """A process that is stopped itself would never end what it works at, as a second interrupt once made the pool wait for."""
    children = children_of(collecting)
    os.kill(children[0], signal.SIGSTOP)
    os.kill(collecting.pid, signal.SIGTERM)
    _, errors = collecting.communicate(timeout=60)
    assert collecting.returncode == 130 and errors.endswith("error: interrupted; what is not saved yet is lost.\n"), errors
    assert not list(tmp_path.iterdir()) and not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_lost_process_is_told(collecting, tmp_path):
    os.kill(children_of(collecting)[0], signal.SIGKILL)
    _, errors = collecting.communicate(timeout=60)
    assert collecting.returncode == 1 and "error: A process that was collecting ended" in errors, errors
    assert "Traceback" not in errors and not list(tmp_path.iterdir())


def test_processes_end_with_a_killed_parent(collecting):
    children = children_of(collecting)
    assert len(children) == 2
    collecting.kill()
    collecting.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in children)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
