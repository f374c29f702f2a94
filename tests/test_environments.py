"""Names, terminal functions, and the physics of the point maze."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from dydiff.environments import ENVIRONMENTS, environment_name, environment_spec
from dydiff.environments.maze import LAYOUTS, WaypointController, free_cells, goal_cell, maze_reward, plan_values
from dydiff.environments.terminal import terminal_function
from dydiff.errors import DydiffError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hopper", "hopper"),
        ("Hopper-v2", "hopper"),
        ("HalfCheetah-v4", "halfcheetah"),
        ("Walker2d-v2", "walker2d"),
        ("hopper-medium-expert-v2", "hopper"),
        ("InvertedPendulum-v2", "inverted_pendulum"),
        ("inverted-pendulum", "inverted_pendulum"),
        ("maze2d-umaze-v1", "maze2d-umaze"),
        ("maze2d-umaze-local", "maze2d-umaze"),
        ("maze2d-large-dense-v1", "maze2d-large-dense"),
        ("antmaze-umaze-diverse-v2", "antmaze-umaze"),
    ],
)
def test_environment_name(name, expected):
    assert environment_name(name) == expected


@pytest.mark.parametrize("name", ["hoper", "antmaze-giant", "HumanoidStandup-v2", "maze2d", ""])
def test_unknown_environment_is_refused(name):
    with pytest.raises(DydiffError, match="unknown"):
        environment_name(name)


def test_error_names_the_nearest():
    with pytest.raises(DydiffError, match="hopper"):
        environment_spec("hoper")
    with pytest.raises(DydiffError, match="No simulator of antmaze-umaze"):
        environment_spec("antmaze-umaze-v2")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_spec_agrees_with_the_simulator(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = environment_spec(name)
    environment = spec.make()
    observation, _ = environment.reset(seed=0)
    assert observation.shape == environment.observation_space.shape == (spec.observation_dim,)
    assert environment.spec is None or environment.spec.max_episode_steps == spec.max_episode_steps
    np.testing.assert_allclose(environment.action_space.low, spec.action_low)
    np.testing.assert_allclose(environment.action_space.high, spec.action_high)
    assert environment.unwrapped.model.nq == spec.position_dim
    assert environment.unwrapped.model.nv == spec.velocity_dim
    assert not list(tmp_path.iterdir())  # MuJoCo left no log


def test_importing_loads_no_simulator():
    code = "import sys, dydiff.environments; sys.exit(bool({'mujoco', 'gymnasium', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("environment", "width", "columns", "done"),
    [
        ("hopper", 11, {0: 1.25}, False),
        ("hopper", 11, {0: 0.7}, True),
        ("hopper", 11, {0: 1.25, 1: 0.2}, True),
        ("hopper", 11, {0: 1.25, 1: -0.199}, False),
        ("hopper", 11, {0: 1.25, 10: 100.0}, True),
        ("hopper", 11, {0: 200.0}, False),
        ("hopper", 11, {0: INF}, True),
        ("hopper", 11, {0: 1.25, 5: NAN}, True),
        ("walker2d", 17, {0: 1.25}, False),
        ("walker2d", 17, {0: 2.0}, True),
        ("walker2d", 17, {0: 0.8}, True),
        ("walker2d", 17, {0: 1.25, 1: -1.0}, True),
        ("walker2d", 17, {0: NAN}, True),
        ("walker2d", 17, {0: 1.25, 9: 1e6}, False),
        ("halfcheetah", 17, {0: -50.0, 3: NAN}, False),
        ("ant", 27, {0: 0.2}, False),
        ("ant", 111, {0: 1.0}, False),
        ("ant", 27, {0: 1.001}, True),
        ("ant", 27, {0: 0.5, 26: INF}, True),
        ("humanoid", 376, {0: 1.0}, False),
        ("humanoid", 376, {0: 0.999}, True),
        ("inverted_pendulum", 4, {1: 0.2}, False),
        ("inverted_pendulum", 4, {1: -0.201}, True),
        ("inverted_pendulum", 4, {3: NAN}, True),
        ("maze2d-umaze", 4, {0: 1e9}, False),
        ("antmaze-large", 29, {0: -1.0}, False),
        ("maze2d", 4, {0: NAN}, False),
        ("Hopper-v2", 11, {0: 0.5}, True),
    ],
)
def test_terminal_functions(environment, width, columns, done):
    observation = torch.zeros(2, 3, width)
    for column, value in columns.items():
        observation[..., column] = value
    result = terminal_function(environment)(observation)
    assert result.dtype == torch.bool and result.shape == (2, 3)
    assert result.eq(done).all()


def test_terminal_function_agrees_with_the_simulator():
    environment = environment_spec("hopper").make()
    is_done = terminal_function("hopper")
    environment.action_space.seed(0)
    environment.reset(seed=0)
    for _ in range(300):
        observation, _, terminated, _, _ = environment.step(environment.action_space.sample())
        assert bool(is_done(torch.from_numpy(observation))) == terminated
        if terminated:
            environment.reset()


def test_ant_is_padded_like_d4rl():
    environment = environment_spec("ant").make()
    observation, _ = environment.reset(seed=0)
    assert np.any(observation[:27]) and not np.any(observation[27:])
    assert not np.any(environment.step(np.full(8, 0.5, np.float32))[0][27:])


def make_maze(layout="umaze", suffix=""):
    environment = environment_spec(f"maze2d-{layout}{suffix}").make().unwrapped
    environment.reset(seed=0)
    return environment


def test_maze_starts_in_free_cells():
    environment = make_maze()
    starts = np.stack([environment.reset(seed=seed)[0] for seed in range(200)])
    cells = starts[:, :2].round()
    assert {tuple(cell) for cell in cells.astype(int).tolist()} == set(free_cells("umaze"))
    assert np.abs(starts[:, :2] - cells).max() <= 0.1
    assert 0.08 < starts[:, 2:].std() < 0.12
    np.testing.assert_array_equal(environment.reset(seed=7)[0], starts[7])


def test_maze_free_motion_is_damped_newton():
    environment = make_maze()
    environment.set_state(np.array([1.0, 1.0]), np.array([0.0, 1.0]))
    observation = environment.step(np.array([0.0, 0.0]))[0]
    mass, step = 4 / 3 * np.pi * 0.1**3 * 1000, 0.01
    velocity = 1.0 - step * 1.0 / (mass + step * 1.0)  # MuJoCo's Euler treats damping implicitly
    np.testing.assert_allclose(observation, [1.0, 1.0 + step * velocity, 0.0, velocity], atol=1e-9)


def test_maze_velocity_limit_acts_before_the_step():
    environment = make_maze()
    environment.set_state(np.array([1.0, 1.0]), np.array([0.0, 9.0]))
    slow = environment.step(np.array([0.0, 0.0]))[0]
    assert 4.9 < slow[3] < 5.0
    environment.set_state(np.array([1.0, 1.0]), np.array([0.0, 9.0]))
    fast = environment.step(np.array([0.0, 1.0]))[0]
    assert 5.2 < fast[3] < 5.25  # one step's acceleration beyond the limit


def test_maze_actions_are_clipped():
    environment = make_maze()
    ends = []
    for force in (1.0, 100.0):
        environment.set_state(np.array([1.0, 1.0]), np.zeros(2))
        ends.append(environment.step(np.array([0.0, force]))[0])
    np.testing.assert_array_equal(*ends)


def test_walls_stop_the_particle():
    environment = make_maze()
    environment.set_state(np.array([1.0, 1.0]), np.zeros(2))
    for _ in range(200):
        observation = environment.step(np.array([-1.0, -1.0]))[0]
    # the wall's face is at world 0.5, the particle's radius 0.1, its origin at world 1.2
    np.testing.assert_allclose(observation[:2], 0.6 - 1.2 + 1.0, atol=0.01)
    np.testing.assert_allclose(observation[2:], 0.0, atol=1e-3)


@pytest.mark.parametrize("suffix", ["", "-dense"])
def test_maze_reward_is_that_of_the_returned_observation(suffix):
    environment = make_maze(suffix=suffix)
    environment.set_state(np.array([1.0, 1.52]), np.array([0.0, -5.0]))
    observation, reward, terminated, truncated, _ = environment.step(np.array([0.0, -1.0]))
    distance = np.linalg.norm(observation[:2] - goal_cell("umaze"))
    assert distance < 0.5
    assert reward == (pytest.approx(np.exp(-distance)) if suffix else 1.0)
    assert not terminated and not truncated


def test_maze_reward_edges():
    x = np.array([1.5, 1.5001])
    np.testing.assert_array_equal(maze_reward(x, np.ones(2), (1.0, 1.0), dense=False), [1.0, 0.0])
    np.testing.assert_allclose(maze_reward(x[0], 1.0, (1.0, 1.0), dense=True), np.exp(-0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_leads_downhill_to_every_target(layout):
    cells = free_cells(layout)
    for target in cells:
        values = plan_values(layout, target)
        for cell in cells:
            i, j = cell
            neighbours = [values[i + 1, j], values[i - 1, j], values[i, j + 1], values[i, j - 1]]
            assert cell == target or max(neighbours) > values[cell]
    assert values[0, 0] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_controller_reaches_the_goal(layout):
    environment = make_maze(layout)
    limit = environment_spec(f"maze2d-{layout}").max_episode_steps
    observation, _ = environment.reset(seed=3)
    controller = WaypointController(layout, np.random.default_rng(0))
    controller.set_target(observation[:2], goal_cell(layout))
    for _ in range(limit):
        action, reached = controller.act(observation)
        if reached:
            break
        observation = environment.step(np.array(action))[0]
    assert reached
    assert np.linalg.norm(observation[:2] - goal_cell(layout)) < 0.1
