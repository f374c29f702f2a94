"""An environment of one's own, with data of it: `python examples/point.py point.npz`, then README, "Your own environment".

A point on a line is pushed, and lost where it leaves (-1, 1). What dydiff needs to know is a gymnasium id, which importing this
module registers, and when episodes end. `set_observation` is for `dydiff report`, which compares models with it step by step.
"""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
from torch import Tensor

EDGE = 1.0
TIME = 0.1  # of a step
COLUMNS = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"


class Point(gymnasium.Env):
    """Observation: place and velocity. Action: the push. Reward: highest at rest in the middle."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.5, 0.5, size=2)
        return self.state.copy(), {}

    def step(self, action):
        place, velocity = self.state
        self.state = np.array([place + TIME * velocity, velocity + TIME * action[0]])
        reward = 1.0 - abs(self.state[0]) - 0.1 * abs(action[0])
        return self.state.copy(), float(reward), bool(abs(self.state[0]) > EDGE), False, {}

    def set_observation(self, observation):
        """Take the state that shows this observation [O]: here it is the state."""
        self.state = observation.copy()


def is_done(observation: Tensor) -> Tensor:
    """Which raw next observations [..., O] end an episode: bool [...], on their device."""
    return observation[..., 0].abs() > EDGE


gymnasium.register("Point-v0", Point, max_episode_steps=100)


def write_dataset(path: str, rows: int = 20_000, seed: int = 0) -> None:
    """Episodes of somebody who pushes towards the middle, sometimes, in D4RL's schema."""
    environment, random = gymnasium.make("Point-v0"), np.random.default_rng(seed)
    kept: list[tuple] = []
    observation, _ = environment.reset(seed=seed)
    while len(kept) < rows:
        aim = -observation[0] - observation[1] if random.random() < 0.5 else 0.0
        action = np.clip([aim + random.normal()], -2, 2).astype(np.float32)
        following, reward, terminal, timeout, _ = environment.step(action)
        kept.append((observation, action, reward, terminal, timeout and not terminal, following))
        observation = environment.reset()[0] if terminal or timeout else following
    columns = {name: np.array(values) for name, values in zip(COLUMNS, zip(*kept, strict=True), strict=True)}
    np.savez(path, **columns)


if __name__ == "__main__":
    write_dataset(*sys.argv[1:2])
