"""The point maze of D4RL's maze2d tasks (arXiv 2004.07219) on the MuJoCo bindings, and the controller that drives it.

A cell's name is (row, column), and the task takes that pair for its centre in the particle's coordinates. It is not:
the particle's body rests at (1.2, 1.2) while walls are centred at cell + 1, so a free cell spans
cell - 0.7 to cell + 0.3.
"""

from __future__ import annotations

import math

import gymnasium
import mujoco
import numpy as np

# '#' is a wall, 'O' a free cell, 'G' the goal of the evaluation task
LAYOUTS = {
    "umaze": ("#####", "#GOO#", "###O#", "#OOO#", "#####"),
    "medium": (
        "########",
        "#OO##OO#",
        "#OO#OOO#",
        "##OOO###",
        "#OO#OOO#",
        "#O#OO#O#",
        "#OOO#OG#",
        "########",
    ),
    "large": (
        "############",
        "#OOOO#OOOOO#",
        "#O##O#O#O#O#",
        "#OOOOOO#OOO#",
        "#O####O###O#",
        "#OO#O#OOOOO#",
        "##O#O#O#O###",
        "#OO#OOO#OGO#",
        "############",
    ),
}
MAX_SPEED = 5.0
GOAL_RADIUS = 0.5
BODY_OFFSET = 0.2  # of a cell's name against the middle between its walls


def free_cells(layout: str) -> list[tuple[int, int]]:
    """Return the cells of a layout that are no walls, in reading order."""
    return [(i, j) for i, row in enumerate(LAYOUTS[layout]) for j, tile in enumerate(row) if tile != "#"]


def goal_cell(layout: str) -> tuple[int, int]:
    """Return the cell marked as the goal."""
    return next((i, row.index("G")) for i, row in enumerate(LAYOUTS[layout]) if "G" in row)


def build_model(layout: str) -> mujoco.MjModel:
    """Build the MuJoCo model: a sphere on two slide joints with motors, between boxes; no friction, no gravity."""
    # MuJoCo 3.5 began to sum the margins of two geoms where it had taken the larger: half each keeps 0.002 in total.
    version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
    margin = 0.001 if version >= (3, 5) else 0.002
    walls = "".join(
        f'<geom type="box" size="0.5 0.5 0.2" pos="{i + 1} {j + 1} 0"/>'
        for i, row in enumerate(LAYOUTS[layout])
        for j, tile in enumerate(row)
        if tile == "#"
    )
    return mujoco.MjModel.from_xml_string(f"""
        <mujoco>
          <option timestep="0.01" gravity="0 0 0" integrator="Euler" iterations="20"/>
          <default>
            <joint type="slide" damping="1" limited="false"/>
            <geom density="1000" margin="{margin}" condim="1"/>
            <motor gear="100" ctrlrange="-1 1" ctrllimited="true"/>
          </default>
          <worldbody>
            {walls}
            <body pos="1.2 1.2 0">
              <geom type="sphere" size="0.1"/>
              <joint name="x" axis="1 0 0"/>
              <joint name="y" axis="0 1 0"/>
            </body>
          </worldbody>
          <actuator><motor joint="x"/><motor joint="y"/></actuator>
        </mujoco>""")


def maze_reward(x, y, goal: tuple[float, float], dense: bool):
    """Return the reward of positions (scalars or [N]): 1 within 0.5 of the goal, or exp(-distance) if `dense`."""
    distance = np.hypot(x - goal[0], y - goal[1])
    return np.exp(-distance) if dense else (distance <= GOAL_RADIUS) * 1.0


def _clip(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


class MazeEnvironment(gymnasium.Env):
    """The maze2d task: a force-driven particle, rewarded near a fixed goal; it never terminates.

    Observation [x, y, vx, vy] in metres and metres per second, action: two forces in [-1, 1]. `step` returns the reward
    of the observation that it returns, as D4RL's environment does; in D4RL's *files* a row's reward belongs to the
    row's observation.
    """

    metadata = {"render_modes": []}

    def __init__(self, layout: str, dense: bool = False):
        self.layout = layout
        self.dense = dense
        self.goal = tuple(float(value) for value in goal_cell(layout))
        self.model = build_model(layout)
        self.data = mujoco.MjData(self.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._free_cells = free_cells(layout)
        # views, made once: every lookup in the bindings makes a new one
        self._qpos, self._qvel, self._ctrl = self.data.qpos, self.data.qvel, self.data.ctrl

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        cell = self._free_cells[self.np_random.integers(len(self._free_cells))]
        self._qpos[:] = cell + self.np_random.uniform(-0.1, 0.1, 2)
        self._qvel[:] = self.np_random.normal(0.0, 0.1, 2)
        return self._get_obs(), {}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put the particle at position `qpos` [2] with velocity `qvel` [2]."""
        mujoco.mj_resetData(self.model, self.data)
        self._qpos[:] = qpos
        self._qvel[:] = qvel

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        for axis in (0, 1):
            self._ctrl[axis] = _clip(float(action[axis]), 1.0)
            # acts on the state before the step: a returned velocity may exceed it by one step's acceleration
            self._qvel[axis] = _clip(self._qvel[axis], MAX_SPEED)
        mujoco.mj_step(self.model, self.data)
        observation = self._get_obs()
        reward = float(maze_reward(observation[0], observation[1], self.goal, self.dense))
        return observation, reward, False, False, {}

    def _get_obs(self) -> np.ndarray:
        return np.concatenate((self._qpos, self._qvel))


def plan_values(layout: str, target: tuple[int, int], discount: float = 0.99, iterations: int = 50) -> np.ndarray:
    """Return the values [rows, columns] by tabular Q-iteration: being in the target earns 1 a step, walls have 0."""
    free = np.array([[tile != "#" for tile in row] for row in LAYOUTS[layout]])
    reward = np.zeros(free.shape)
    reward[target] = 1.0
    values = np.zeros(free.shape)
    for _ in range(iterations):  # the longest way through a layout has fewer steps
        moves = [np.roll(values, shift, axis) for axis in (0, 1) for shift in (1, -1)]  # the rim is wall: nothing wraps
        values = np.where(free, reward + discount * np.maximum.reduce([values, *moves]), 0.0)
    return values


class WaypointController:
    """D4RL's maze2d controller: Q-iteration over the cells gives waypoints, a PD law drives from one to the next."""

    POSITION_GAIN, VELOCITY_GAIN = 10.0, -1.0
    REACHED = 0.1
    WAYPOINT_JITTER = 0.2

    def __init__(self, layout: str, generator: np.random.Generator):
        self._layout = layout
        self._generator = generator
        self._values: dict[tuple[int, int], np.ndarray] = {}  # by target cell
        self._waypoints: list[tuple[float, float]] = []

    def set_target(self, position: np.ndarray, target: tuple[int, int]) -> None:
        """Plan from `position` [2] to the centre of the cell `target`."""
        if target not in self._values:
            self._values[target] = plan_values(self._layout, target)
        values = self._values[target]
        cell = (round(position[0] + BODY_OFFSET), round(position[1] + BODY_OFFSET))
        self._waypoints = []
        while cell != target:
            i, j = cell
            cell = max(((i, j + 1), (i + 1, j), (i, j - 1), (i - 1, j)), key=lambda neighbour: values[neighbour])
            if cell != target:
                self._waypoints.append(tuple(cell - self._generator.uniform(0.0, self.WAYPOINT_JITTER, 2)))
        self._waypoints.append((float(target[0]), float(target[1])))
        self._waypoints.reverse()

    def act(self, observation: np.ndarray) -> tuple[list[float], bool]:
        """Return the noiseless action [2] at an observation [4], and whether the target's centre is within 0.1."""
        x, y, vx, vy = observation.tolist()
        goal_x, goal_y = self._waypoints[0]
        reached = math.hypot(goal_x - x, goal_y - y) < self.REACHED
        way_x, way_y = self._waypoints[0] if reached else self._waypoints[-1]
        force_x = self.POSITION_GAIN * (way_x - x) + self.VELOCITY_GAIN * vx
        force_y = self.POSITION_GAIN * (way_y - y) + self.VELOCITY_GAIN * vy
        if not reached and math.hypot(way_x - x, way_y - y) < self.REACHED:
            self._waypoints.pop()
        return [_clip(force_x, 1.0), _clip(force_y, 1.0)], reached
