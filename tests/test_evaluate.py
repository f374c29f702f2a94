"""Evaluation in waves, and rollouts of the true simulator."""

import numpy as np
import pytest

from dydiff.environments import environment_spec
from dydiff.environments.simulate import roll_out_simulator, state_from_observation
from dydiff.errors import DydiffError
from dydiff.evaluate import Evaluator, episode_seed, evaluate

HOPPER = environment_spec("hopper")
MAZE = environment_spec("maze2d-umaze")


def zeros(spec):
    return lambda observation: np.zeros((len(observation), spec.action_dim))


def run_one_episode(spec, seed, max_path_length):
    environment = spec.make()
    environment.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over and length < max_path_length:
        _, reward, terminated, truncated, _ = environment.step(np.zeros(spec.action_dim, np.float32))
        total, length, over = total + reward, length + 1, terminated or truncated
    return total, length


def test_whole_waves_of_finished_episodes():
    result = evaluate(zeros(HOPPER), HOPPER, seed=3, steps=400, num_environments=3)
    assert result.num_episodes % 3 == 0
    assert result.num_steps >= 400 > result.lengths[:-3].sum()
    for episode in range(result.num_episodes):  # lockstep changes nothing about an episode
        expected = run_one_episode(HOPPER, episode_seed(3, episode), 1000)
        assert (result.returns[episode], result.lengths[episode]) == expected
    assert result.mean_return == pytest.approx(result.returns.mean())
    assert (result.environment, result.backend, result.seed) == ("hopper", "gymnasium-v4", 3)
    assert result.mujoco_version[0].isdigit()


def test_evaluation_repeats_under_its_seed():
    with Evaluator(HOPPER, steps=200, num_environments=2) as evaluator:
        first, other, again = (evaluator.evaluate(zeros(HOPPER), seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns, other.returns)


def test_one_call_a_step_with_a_constant_batch():
    shapes = []

    def act(observation):
        shapes.append((observation.shape, observation.dtype))
        return np.zeros((len(observation), 3), np.float32)

    result = evaluate(act, HOPPER, seed=0, steps=1, num_environments=4)
    assert set(shapes) == {((4, 11), np.dtype(np.float32))}
    assert len(shapes) == result.lengths.max() > result.lengths.min()


def test_path_limits():
    result = evaluate(zeros(MAZE), MAZE, seed=0, steps=600)
    assert result.lengths.tolist() == [300, 300]  # the environment's own limit
    result = evaluate(zeros(MAZE), MAZE, seed=0, steps=60, max_path_length=20)
    assert result.lengths.tolist() == [20, 20, 20]


@pytest.mark.parametrize("name", ["steps", "max_path_length", "num_environments"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(DydiffError, match=name):
        Evaluator(MAZE, **{name: 0})


def test_unusable_actions_are_refused():
    with pytest.raises(DydiffError, match="hopper.*seed.*diverged"):
        evaluate(lambda observation: np.full((len(observation), 3), np.nan), HOPPER, seed=0)
    with pytest.raises(DydiffError, match=r"shape \(5, 2\)"):
        evaluate(lambda observation: np.zeros((len(observation), 2)), HOPPER, seed=0)


def test_failing_environment_is_named(monkeypatch):
    from dydiff.environments.maze import MazeEnvironment

    def fail(self, action):
        raise RuntimeError("the physics gave up")

    monkeypatch.setattr(MazeEnvironment, "step", fail)
    message = rf"stepping maze2d-umaze.*seed {episode_seed(5, 0)}.*the physics gave up"
    with pytest.raises(DydiffError, match=message):
        evaluate(zeros(MAZE), MAZE, seed=5)


@pytest.mark.parametrize("name", ["hopper", "ant", "maze2d-medium"])
def test_simulator_rollout_retraces_an_episode(name):
    spec = environment_spec(name)
    environment = spec.make()
    observations = [environment.reset(seed=1)[0]]
    data = environment.unwrapped.data
    qpos, qvel = data.qpos.copy(), data.qvel.copy()
    actions = np.random.default_rng(0).uniform(-1, 1, (8, spec.action_dim)).astype(np.float32)
    rewards = []
    for action in actions:
        observation, reward, *_ = environment.step(action)
        observations.append(observation)
        rewards.append(reward)

    replayed = roll_out_simulator(spec, qpos[None], qvel[None], horizon=8, actions=actions[None])
    np.testing.assert_allclose(replayed.observation[0], observations[:8], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(replayed.reward[0], rewards, rtol=1e-5, atol=1e-6)
    assert not replayed.terminal.any()

    restored = state_from_observation(spec, np.stack(observations[:1]))
    moved = roll_out_simulator(spec, *restored, horizon=8, actions=actions[None])
    np.testing.assert_allclose(moved.observation, replayed.observation, atol=1e-4)


def test_closed_loop_rollout_in_blocks():
    generator = np.random.default_rng(0)
    qpos, qvel = generator.uniform(0.9, 1.1, (5, 2)), generator.normal(0, 0.1, (5, 2))

    def act(observation):
        return -observation[:, 2:]

    blocks = roll_out_simulator(MAZE, qpos, qvel, horizon=6, act=act, num_environments=2)
    together = roll_out_simulator(MAZE, qpos, qvel, horizon=6, act=act)
    for ours, expected in zip(blocks, together, strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(blocks.observation[:, 0], np.concatenate((qpos, qvel), axis=1), rtol=1e-6)
    np.testing.assert_array_equal(blocks.action, -blocks.observation[..., 2:])


def test_terminal_flags_of_a_fall():
    leaning = np.array([[1.25, 0.3, *[0.0] * 9], [1.25, 0.0, *[0.0] * 9]])
    qpos, qvel = state_from_observation(HOPPER, leaning)
    fallen = roll_out_simulator(HOPPER, qpos, qvel, horizon=3, act=zeros(HOPPER))
    np.testing.assert_array_equal(fallen.terminal, [[True] * 3, [False] * 3])


def test_rollout_arguments_are_checked():
    with pytest.raises(DydiffError, match="not both"):
        roll_out_simulator(MAZE, np.ones((1, 2)), np.ones((1, 2)), horizon=2)
    with pytest.raises(DydiffError, match=r"qvel of shape \(3, 2\), not \(2, 2\)"):
        roll_out_simulator(MAZE, np.ones((3, 2)), np.ones((2, 2)), horizon=2, act=zeros(MAZE))
