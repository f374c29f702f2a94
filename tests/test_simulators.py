"""The simulators: old physics put back, the legacy package behind today's interface, and names that reach every score."""

import json
import sys
from types import ModuleType, SimpleNamespace

import mujoco
import numpy as np
import pytest
import tiny

from dydiff.checkpoint import load_checkpoint
from dydiff.collecting.collect import collect
from dydiff.data import dataset_from_arrays, read_dataset, write_dataset
from dydiff.environments import D4RL_LOCOMOTION, ENVIRONMENTS, environment_spec, simulators
from dydiff.errors import DydiffError
from dydiff.evaluate import evaluate
from dydiff.models import POLICY
from dydiff.problem import load_problem

MODERN = tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 5)


def make_model(name: str, backend: str) -> mujoco.MjModel:
    return environment_spec(name, backend).make().unwrapped.model


def test_hopper_has_its_old_masses():
    # known from MuJoCo 2.1.0 and 2.1.1, which made capsules exact
    stock, compatible = (make_model("hopper", backend) for backend in ("gymnasium-v4", "d4rl-compat"))
    np.testing.assert_allclose(stock.body_mass[1:], [3.665, 4.058, 2.781, 5.316], atol=5e-4)
    np.testing.assert_allclose(compatible.body_mass[1:], [3.534, 3.927, 2.714, 5.089], atol=5e-4)
    assert compatible.body_subtreemass[1] == pytest.approx(compatible.body_mass.sum())  # derived constants followed
    assert compatible.dof_M0[0] == pytest.approx(compatible.body_mass.sum())


def test_old_capsule_by_hand():
    compatible = make_model("hopper", "d4rl-compat")
    radius, half, mass = 0.05, 0.2, compatible.body_mass[1]
    length = 2 * half + radius
    across = mass * (3 * radius**2 + length**2) / 12
    np.testing.assert_allclose(compatible.body_inertia[1], [across, across, mass * radius**2 / 2])
    np.testing.assert_array_equal(compatible.body_ipos, make_model("hopper", "gymnasium-v4").body_ipos)


@pytest.mark.parametrize("name", D4RL_LOCOMOTION)
def test_margin_is_halved_where_mujoco_adds_them_up(name):
    stock, compatible = (make_model(name, backend) for backend in ("gymnasium-v4", "d4rl-compat"))
    np.testing.assert_allclose(compatible.geom_margin, stock.geom_margin * (0.5 if MODERN else 1))
    assert len(set(compatible.geom_margin)) == 1  # so that half of two is one


def test_cheetah_keeps_its_total_mass():
    stock, compatible = (make_model("halfcheetah", backend) for backend in ("gymnasium-v4", "d4rl-compat"))
    assert stock.body_mass.sum() == pytest.approx(14) and compatible.body_mass.sum() == pytest.approx(14)
    assert compatible.body_mass[1] != pytest.approx(stock.body_mass[1], rel=1e-3)


@pytest.mark.parametrize("name", D4RL_LOCOMOTION)
def test_exact_capsules_give_back_the_models_bodies(name, monkeypatch):
    """The parts that put bodies together are MuJoCo's own, halfcheetah's torso of two capsules included."""

    def exact_volumes(model, geom):
        radius, half = model.geom_size[geom, :2]
        straight = 0 if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE else 2 * half
        volume = np.pi * radius**2 * (straight + 4 / 3 * radius)
        return volume, volume

    def exact_inertia(model, geom, mass):
        radius, half = model.geom_size[geom, :2]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE:
            return np.full(3, 0.4 * mass * radius**2)
        ball = mass * 4 / 3 * radius / (2 * half + 4 / 3 * radius)
        rod = mass - ball
        across = rod * (3 * radius**2 + 4 * half**2) / 12 + ball * (0.4 * radius**2 + half**2 + 0.75 * half * radius)
        return np.array([across, across, rod * radius**2 / 2 + ball * 0.4 * radius**2])

    monkeypatch.setattr(simulators, "_geom_volumes", exact_volumes)
    monkeypatch.setattr(simulators, "_geom_inertia", exact_inertia)
    stock, compatible = (make_model(name, backend) for backend in ("gymnasium-v4", "d4rl-compat"))
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat", "body_subtreemass", "dof_invweight0"):
        np.testing.assert_allclose(getattr(compatible, field), getattr(stock, field), rtol=1e-8, atol=1e-10)


def test_rewards_differ_where_the_simulators_do():
    def zeros(observation):
        return np.zeros((len(observation), 3))

    results = {
        backend: evaluate(zeros, environment_spec("hopper", backend), seed=0, steps=100, num_environments=2)
        for backend in ("gymnasium-v4", "gymnasium-v5", "d4rl-compat")
    }
    for backend, result in results.items():
        assert (result.backend, result.mujoco_version) == (backend, mujoco.__version__)
    assert len({tuple(result.returns) for result in results.values()}) == 3


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_simulator_agrees_with_its_spec(name):
    spec = environment_spec(name)
    for backend in set(spec.backends) - {"d4rl", spec.backend}:
        other = spec.with_backend(backend)
        environment = other.make()
        observation, _ = environment.reset(seed=0)
        assert observation.shape == environment.observation_space.shape == (other.observation_dim,)
        assert environment.unwrapped.model.nq == other.position_dim
        np.testing.assert_allclose(environment.action_space.high, other.action_high)
    assert spec.with_backend(spec.backend) == spec


def test_unknown_simulators_are_refused():
    with pytest.raises(DydiffError, match="gymnasium-v4, gymnasium-v5, d4rl-compat, d4rl"):
        environment_spec("hopper", "gymnasium-v6")
    with pytest.raises(DydiffError, match="dydiff-maze2d, d4rl"):
        environment_spec("maze2d-umaze", "d4rl-compat")
    with pytest.raises(DydiffError, match="gymnasium-v5"):
        environment_spec("humanoid", "d4rl-compat")


# The legacy package, with a stand-in for it


class OldHopper:
    """An environment as old gym and mujoco-py gave it: four values a step, seeds by a method."""

    def __init__(self):
        self.unwrapped = self
        self.sim = SimpleNamespace(data=SimpleNamespace(qpos=np.zeros(6), qvel=np.zeros(6)), model=SimpleNamespace(nq=6, nv=6))
        self.observation_space = SimpleNamespace(low=np.full(11, -np.inf), high=np.full(11, np.inf))
        self.action_space = SimpleNamespace(low=-np.ones(3, np.float32), high=np.ones(3, np.float32))

    def seed(self, seed):
        self.start = seed % 7

    def reset(self):
        self.steps = 0
        self.sim.data.qpos[:] = self.start
        return self._get_obs()

    def set_state(self, qpos, qvel):
        self.sim.data.qpos[:], self.sim.data.qvel[:] = qpos, qvel

    def _get_obs(self):
        return np.concatenate((self.sim.data.qpos[1:], self.sim.data.qvel))

    def step(self, action):
        self.steps += 1
        self.sim.data.qpos[:] += action[0]
        late = self.steps == 4
        return self._get_obs(), 1.5, late or action[0] > 0.9, {"TimeLimit.truncated": True} if late else {}

    def close(self):
        pass


@pytest.fixture
def legacy(monkeypatch):
    gym = ModuleType("gym")
    gym.make = lambda name: {"hopper-medium-v2": OldHopper}[name]()
    monkeypatch.setitem(sys.modules, "gym", gym)
    monkeypatch.setitem(sys.modules, "d4rl", ModuleType("d4rl"))


def test_legacy_episodes(legacy):
    spec = environment_spec("hopper", "d4rl")
    result = evaluate(lambda observation: np.zeros((len(observation), 3)), spec, seed=0, steps=4, num_environments=1)
    assert (result.backend, result.returns.tolist(), result.lengths.tolist()) == ("d4rl", [6.0], [4])
    environment = spec.make()
    environment.reset(seed=3)
    assert environment.unwrapped.data.qpos[0] == 3
    assert environment.step(np.full(3, 0.95))[2:4] == (True, False)  # terminated
    for _ in range(3):
        outcome = environment.step(np.zeros(3))
    assert outcome[2:4] == (False, True)  # truncated
    assert spec.simulator.startswith("d4rl, mujoco-py ")


def test_missing_or_broken_legacy_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "d4rl", None)
    with pytest.raises(DydiffError, match="ImportError|ModuleNotFoundError.*mujoco-py with MuJoCo 2.1"):
        environment_spec("hopper", "d4rl").make()


# Which simulator a run takes, and where it says so


def make_arrays(rows=30):
    return {
        "observations": np.random.default_rng(0).normal(size=(rows, 11)),
        "actions": np.zeros((rows, 3)),
        "rewards": np.zeros(rows),
        "terminals": np.zeros(rows, bool),
    }


@pytest.mark.parametrize(
    ("name", "metadata", "backend"),
    [
        ("hopper-medium-v2", {}, "d4rl-compat"),
        ("hopper_medium-v2.hdf5", {}, None),  # nobody knows what a file's name is worth
        ("maze2d-umaze-v1", {}, None),
        ("hopper-random-local", {"backend": "gymnasium-v4"}, "gymnasium-v4"),
        ("mujoco/hopper/medium-v0", {"environment": "Hopper-v5", "backend": "gymnasium-v5"}, "gymnasium-v5"),
        ("mine", {"environment": "hopper", "backend": "isaac"}, None),
        ("mine", {"environment": "my-robot", "backend": "gymnasium-v4"}, None),
    ],
)
def test_data_name_the_simulator_that_made_them(name, metadata, backend):
    assert dataset_from_arrays(make_arrays(), name, metadata=metadata).backend == backend


def test_runs_keep_the_simulators_name(command, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    collect("hopper-random-local", steps=300, seed=0, progress=False)
    assert load_problem("hopper-random-local").simulator == f"gymnasium-v4, MuJoCo {mujoco.__version__}"
    write_dataset(tmp_path / "hopper_medium-v2.hdf5", read_dataset("hopper-random-local").arrays, {})
    for environment in (None, "Hopper-v2"):  # as people's experiment files have it
        assert load_problem("hopper-medium-v2", environment).simulator == f"d4rl-compat, MuJoCo {mujoco.__version__}"
    file = tiny.write_experiment(tmp_path / "policy.yaml", "td3_bc", "hopper-random-local")
    changes = ["--set=rl_trainer_params.real_ratio=1", "--set=env_specs.backend=d4rl-compat"]
    outcome = command("run", "-e", file, "--device=cpu", f"--outdir={tmp_path / 'runs'}", *changes)
    assert outcome.status == 0, outcome.errors
    (run,) = (tmp_path / "runs").iterdir()
    expected = f"d4rl-compat, MuJoCo {mujoco.__version__}"
    assert json.loads((run / "run.json").read_text())["simulator"] == expected
    assert load_checkpoint(run / "agent.safetensors", POLICY)[1]["simulator"] == expected
    outcome = command("run", "-e", file, "--device=cpu", f"--outdir={tmp_path / 'runs'}", "--set=env_specs.backend=v4")
    assert outcome.status == 1 and "No simulator 'v4' of hopper" in outcome.errors
