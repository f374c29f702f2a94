"""How far models part from the simulator, and how often their episodes end elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dydiff.data import Spaces
from dydiff.environments import EnvironmentSpec
from dydiff.environments.simulate import SimulatedTrajectories, roll_out_simulator, state_from_observation
from dydiff.reports.uncertainty import mean_with_error

TRUE_STATES = "true states"  # the reward model and the terminal function on what the simulator did

Deviations = dict[str, dict[str, np.ndarray]]  # by quantity and model


@dataclass
class Comparison:
    """The same policy in the simulator and in each model, from the same B start states, over H rows."""

    simulated: SimulatedTrajectories
    modelled: dict[str, SimulatedTrajectories]  # by model: what it says, in the simulator's form
    known: np.ndarray  # [B, H] bool: false where recorded actions have come to their end before the simulator's episode

    @property
    def alive(self) -> np.ndarray:
        """Rows before which the simulator's episode has not ended: [B, H] bool."""
        return self.known & _is_alive(self.simulated.terminal)

    def deviations(self, spec: EnvironmentSpec, spaces: Spaces, with_steps: bool = False) -> Deviations:
        """Distance from the simulator [B, H], by quantity and model.

        `state`: root mean square over the z-scored columns. `position` (mazes, where it has one unit): distance in metres.
        `reward`: of the step from that row. `return`: of the sum of rewards until then, in each up to its own end of the episode.
        `ending`: 1 where the episode goes on in one and has ended in the other. With `with_steps`, `step`: as
        `state`, of the row against the simulator's one step from the model's row before with its action: whether its transitions
        are true, wherever they are.
        """
        truth, scale = self.simulated, spaces.z_score.inverse_std.cpu().numpy()
        deviations: Deviations = {}
        for name, model in self.modelled.items():
            quantities: dict[str, np.ndarray] = {}
            if name != TRUE_STATES:
                difference = model.observation - truth.observation  # [B, H, O]
                quantities["state"] = np.sqrt(np.square(difference * scale).mean(axis=-1))
                if spec.is_maze:
                    quantities["position"] = np.linalg.norm(difference[..., :2], axis=-1)
                if with_steps:
                    difference = model.observation - _step_simulator(spec, model)
                    quantities["step"] = np.sqrt(np.square(difference * scale).mean(axis=-1))
            quantities |= {
                "reward": np.abs(model.reward - truth.reward),
                "return": np.abs(_returns(model) - _returns(truth)),
                "ending": (_is_alive(model.terminal) != _is_alive(truth.terminal)).astype(float),
            }
            for quantity, values in quantities.items():
                deviations.setdefault(quantity, {})[name] = values
        return deviations

    def errors(self, deviations: Deviations) -> dict[str, Any]:
        """Mean and standard error of `deviations` over the starts, by quantity, model and row."""
        return {
            quantity: {name: _over_starts(values, self._counted(quantity)) for name, values in by_model.items()}
            for quantity, by_model in deviations.items()
        }

    def averages(self, deviations: Deviations) -> Deviations:
        """Each start's `deviations`, averaged over its rows after the first: [B] by quantity and model."""
        averages: Deviations = {}
        for quantity, by_model in deviations.items():
            counted = self._counted(quantity)[:, 1:]
            rows = counted.sum(axis=1).clip(min=1)
            averages[quantity] = {name: (values[:, 1:] * counted).sum(axis=1) / rows for name, values in by_model.items()}
        return averages

    def _counted(self, quantity: str) -> np.ndarray:
        """The rows [B, H] that say something of a quantity: most count while the simulator's episode goes on."""
        return self.known if quantity in ("return", "ending") else self.alive

    def returns(self) -> dict[str, dict[str, float | None]]:
        """Return within the horizon of the simulator (key ""), and by how much each model's is above it: mean and its error."""
        truth = _returns(self.simulated)[self._last]
        excess = {name: _returns(model)[self._last] - truth for name, model in self.modelled.items()}
        return {name: mean_with_error(values) for name, values in {"": truth, **excess}.items()}

    def endings(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """The step that ends the episode in each model, against the simulator's, the horizon standing for none.

        `differs`: the fraction of starts where it is another one. `later`: by how many steps (below 0: earlier).
        """
        truth = _first_end(self.simulated.terminal & self.known)
        ends = {name: _first_end(model.terminal & self.known) for name, model in self.modelled.items()}
        return {
            name: {"differs": mean_with_error((end != truth) * 1.0), "later": mean_with_error(end - truth)}
            for name, end in ends.items()
        }

    @property
    def _last(self) -> tuple[np.ndarray, np.ndarray]:
        """The last known row of every start, as an index into [B, H]."""
        return np.arange(len(self.known)), self.known.sum(axis=1) - 1


def _step_simulator(spec: EnvironmentSpec, rollout: SimulatedTrajectories) -> np.ndarray:
    """Where the simulator goes in one step from every row but the last, behind the first row itself: [B, H, O]."""
    before, action = rollout.observation[:, :-1], rollout.action[:, :-1]
    state = state_from_observation(spec, before.reshape(-1, before.shape[-1]))
    twice = np.repeat(action.reshape(-1, 1, action.shape[-1]), 2, axis=1)
    after = roll_out_simulator(spec, *state, 2, actions=twice).observation[:, 1]
    return np.concatenate([rollout.observation[:, :1], after.reshape(before.shape)], axis=1)


def _is_alive(terminal: np.ndarray) -> np.ndarray:
    """Rows with no end before them: [B, H] bool."""
    return terminal.cumsum(axis=1) - terminal == 0


def _returns(trajectories: SimulatedTrajectories) -> np.ndarray:
    """Sum of the rewards until and with each row, up to the end of the episode: [B, H]."""
    return (trajectories.reward * _is_alive(trajectories.terminal)).cumsum(axis=1)


def _first_end(terminal: np.ndarray) -> np.ndarray:
    """The first step [B] that ends the episode; the last row's does not count, for models have no next one."""
    within = terminal[:, :-1]
    return np.where(within.any(axis=1), within.argmax(axis=1), within.shape[1])


def _over_starts(values: np.ndarray, counted: np.ndarray) -> dict[str, list[float | None]]:
    statistics = [mean_with_error(column[rows]) for column, rows in zip(values.T, counted.T, strict=True)]
    return {key: [each[key] for each in statistics] for key in ("mean", "standard_error")}
