"""Episodes of a policy in the true environment, and their returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dydiff.environments import EnvironmentSpec
from dydiff.environments.simulate import Act, SimulatorBatch
from dydiff.errors import DydiffError


@dataclass(frozen=True)
class EvaluationResult:
    """The episodes of one evaluation, and what they were run on (scores of different simulators do not compare)."""

    environment: str
    backend: str
    mujoco_version: str
    seed: int
    returns: np.ndarray  # [episodes] float64: undiscounted sums of rewards
    lengths: np.ndarray  # [episodes] int64

    @property
    def mean_return(self) -> float:
        return float(self.returns.mean())

    @property
    def std_return(self) -> float:
        """Population standard deviation over the episodes."""
        return float(self.returns.std())

    @property
    def mean_length(self) -> float:
        return float(self.lengths.mean())

    @property
    def num_episodes(self) -> int:
        return len(self.returns)

    @property
    def num_steps(self) -> int:
        return int(self.lengths.sum())


class Evaluator:
    """Runs episodes of one environment in waves of `num_environments`; make it once and call `evaluate` every epoch.

    num_environments: by default the number of full-length episodes in `steps`, so that a policy which survives needs
    one wave. Raises DydiffError for counts below 1 and where the simulator cannot be made.
    """

    def __init__(
        self, spec: EnvironmentSpec, steps: int = 5000, max_path_length: int = 1000, num_environments: int | None = None
    ):
        counts = {"steps": steps, "max_path_length": max_path_length, "num_environments": num_environments}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise DydiffError(f"Evaluating {spec.name} needs {name} of at least 1, not {count}.")
        self.spec = spec
        self.steps = steps
        self.max_path_length = min(max_path_length, spec.max_episode_steps)
        self._simulators = SimulatorBatch(spec, num_environments or math.ceil(steps / self.max_path_length))

    def evaluate(self, act: Act, seed: int) -> EvaluationResult:
        """Run waves of episodes until they hold `steps` steps; every episode that is started counts and is finished.

        act: raw observations [n, O] float32 -> raw actions [n, A], called once a step for the whole wave; rows of
        finished episodes stay in it (ignored), so that n, and with it a policy's captured graph and random draws, never
        changes. Episode k's environment is seeded from (seed, k). Raises DydiffError, which names environment and seed,
        for what goes wrong inside an environment, and for actions of a wrong shape or that are not finite.
        """
        returns: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        total = 0
        while total < self.steps:
            wave_returns, wave_lengths = self._run_wave(act, seed, first=len(returns) * self._simulators.size)
            returns.append(wave_returns)
            lengths.append(wave_lengths)
            total += int(wave_lengths.sum())
        return EvaluationResult(
            environment=self.spec.name,
            backend=self.spec.backend,
            mujoco_version=self.spec.mujoco_version,
            seed=seed,
            returns=np.concatenate(returns),
            lengths=np.concatenate(lengths),
        )

    def _run_wave(self, act: Act, seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        count = self._simulators.size
        returns, lengths = np.zeros(count), np.zeros(count, np.int64)
        running = np.ones(count, bool)
        observation = np.empty((count, self.spec.observation_dim), np.float32)
        for i in range(count):
            observation[i] = self._simulators.reset(i, episode_seed(seed, first + i))
        while running.any():
            action = self._simulators.choose(act, observation.copy())  # a copy: the policy may keep it
            for i in np.flatnonzero(running):
                observation[i], reward, terminated, truncated = self._simulators.step(i, action[i])
                returns[i] += reward
                lengths[i] += 1
                running[i] = not (terminated or truncated or lengths[i] >= self.max_path_length)
        return returns, lengths

    def close(self) -> None:
        self._simulators.close()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def episode_seed(seed: int, episode: int) -> int:
    """Return the environment's seed for one episode of an evaluation."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def evaluate(
    act: Act,
    spec: EnvironmentSpec,
    seed: int,
    steps: int = 5000,
    max_path_length: int = 1000,
    num_environments: int | None = None,
) -> EvaluationResult:
    """Evaluate a policy once; see `Evaluator`, which keeps its environments, for doing it again and again."""
    with Evaluator(spec, steps, max_path_length, num_environments) as evaluator:
        return evaluator.evaluate(act, seed)
