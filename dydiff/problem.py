"""A dataset tied to its environment: what the dynamics, the reward and the policy are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dydiff.data import Dataset, Spaces, Transitions, load_dataset, make_transitions
from dydiff.environments import (
    ENVIRONMENTS,
    NO_SIMULATOR,
    WITHOUT_SIMULATOR,
    EnvironmentSpec,
    choose_environment,
    environment_spec,
)
from dydiff.errors import DydiffError


@dataclass
class Problem:
    """A dataset with its environment: what every stage but the diffusion model starts from."""

    dataset: Dataset
    environment: str
    spec: EnvironmentSpec | None  # None where no simulator ships
    transitions: Transitions  # raw, numpy
    spaces: Spaces

    @property
    def simulator(self) -> str:
        """The name and version of the simulator, which stand beside every score: scores of two simulators do not compare."""
        return self.spec.simulator if self.spec else "none"

    def policy_transitions(self, device: str) -> Transitions:
        """The transitions in policy space on `device`."""
        return self.spaces.transitions_to_policy(self.transitions, device)


def load_problem(dataset_name: str, env_name: str | None = None, backend: str | None = None) -> Problem:
    """Load a dataset and tie it to its environment, on the simulator `backend` (None: `Dataset.backend`, where it is known).

    Raises:
        DydiffError: no such dataset, environment or simulator of it, or they do not fit (dimensions, actions outside the box).
    """
    dataset = load_dataset(dataset_name)
    if env_name is None and dataset.environment is None:
        raise DydiffError(
            f"Dataset '{dataset.name}' does not say which environment it is from. Name it (for example hopper, or the id of your "
            f"own in gymnasium; {NO_SIMULATOR!r} where there is no simulator): --environment of `dydiff import`, "
            "env_specs.env_name in an experiment file."
        )
    if env_name is None and ":" in dataset.environment:
        raise DydiffError(
            f"Dataset '{dataset.name}' says that it is from {dataset.environment}, which would run code of that module. If you "
            "trust it, name it yourself: env_specs.env_name in an experiment file."
        )
    try:
        environment = choose_environment(env_name or dataset.environment)
    except DydiffError as error:
        if env_name:
            raise
        raise DydiffError(f"{error} That is what the metadata of dataset '{dataset.name}' say.") from error
    known = {*ENVIRONMENTS, *WITHOUT_SIMULATOR}
    if environment in known and dataset.environment in known - {environment}:
        raise DydiffError(
            f"Dataset '{dataset.name}' is from {dataset.environment}, but env_specs.env_name is {env_name}. Leave env_name out, or "
            "correct one of the two."
        )
    spec = fit_environment(dataset, environment, backend)
    transitions = make_transitions(dataset)
    spaces = Spaces.from_dataset(dataset, transitions, *_action_range(dataset, spec))
    return Problem(dataset, environment, spec, transitions, spaces)


def fit_environment(dataset: Dataset, environment: str, backend: str | None = None) -> EnvironmentSpec | None:
    """The simulator of an environment for a dataset of it, or None where none ships.

    Raises:
        DydiffError: no such environment or simulator of it, or the dataset does not fit it (dimensions, actions outside the box).
    """
    known = backend or (dataset.backend if environment == dataset.environment else None)
    spec = None if environment in (*WITHOUT_SIMULATOR, NO_SIMULATOR) else environment_spec(environment, known)
    if spec is not None:
        ours, theirs = (dataset.observation_dim, dataset.action_dim), (spec.observation_dim, spec.action_dim)
        if ours != theirs:
            raise DydiffError(
                f"Dataset '{dataset.name}' has {ours[0]} observation and {ours[1]} action columns, but {environment} has "
                f"{theirs[0]} and {theirs[1]} ({spec.backend}). Correct env_specs.env_name, env_specs.backend or the dataset."
            )
    low, high = _action_range(dataset, spec)
    outside = (dataset.actions < low - 1e-3) | (dataset.actions > high + 1e-3)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DydiffError(
            f"Dataset '{dataset.name}' holds {int(outside.any(axis=1).sum()):,} actions outside the range of {environment}, "
            f"first in row {row}, column {column}: {dataset.actions[row, column]:g} is not in "
            f"[{low[column]:g}, {high[column]:g}]. Rescale or clip the actions in the file."
        )
    return spec


def _action_range(dataset: Dataset, spec: EnvironmentSpec | None) -> tuple[np.ndarray, np.ndarray]:
    low = np.array(spec.action_low if spec else [-1.0] * dataset.action_dim, np.float32)
    high = np.array(spec.action_high if spec else [1.0] * dataset.action_dim, np.float32)
    return low, high
