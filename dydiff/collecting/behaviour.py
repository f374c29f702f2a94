"""The behaviour policies of local locomotion datasets: uniform actions, and small networks that ship with the package.

`exp_specs/behaviour/train_behaviour.py` trains the networks; the header of each file says how, and what the policy earns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dydiff.errors import DydiffError

SHIPPED = Path(__file__).with_name("policies")
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
Fact = str | int | float


@dataclass(frozen=True)
class UniformPolicy:
    """Actions drawn uniformly between two bounds, whatever is observed."""

    low: Sequence[float]  # [A]
    high: Sequence[float]  # [A]

    def draw_noise(self, generator: np.random.Generator, steps: int) -> np.ndarray:
        """Draw what `act` needs for `steps` steps: uniform in [0, 1), [steps, A] float32."""
        return generator.random((steps, len(self.low)), np.float32)

    def act(self, observation: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions [n, A] that `noise` [n, A] selects, and their log-densities [n]."""
        low, width = np.float32(self.low), np.subtract(self.high, self.low, dtype=np.float32)
        return low + width * noise, np.full(len(noise), -np.log(width).sum())


@dataclass(frozen=True)
class TanhGaussian:
    """`a = tanh(mean + std * noise)`; mean and log-std are linear in the features of two tanh layers of raw observations.

    weights: by D4RL's names for such policies (`fc0/weight` [out, in], `fc0/bias` [out], `fc1/...`, `last_fc/...`,
    `last_fc_log_std/...`), float32. facts: what the file's header says of the policy.
    """

    weights: dict[str, np.ndarray]
    facts: dict[str, Fact]

    def draw_noise(self, generator: np.random.Generator, steps: int) -> np.ndarray:
        """Draw what `act` needs for `steps` steps: standard normal, [steps, A] float32."""
        return generator.standard_normal((steps, len(self.weights["last_fc/bias"])), np.float32)

    def act(self, observation: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the actions [n, A] that `noise` [n, A] selects at raw observations [n, O], and their log-densities [n].

        log(1 - tanh(u)^2) = 2 (ln 2 - u - softplus(-2u)) stays finite where tanh saturates (SAC, arXiv 1801.01290, eq. 21).
        """
        features = np.tanh(self._linear("fc1", np.tanh(self._linear("fc0", observation))))
        log_std = self._linear("last_fc_log_std", features).clip(LOG_STD_MIN, LOG_STD_MAX)
        pre_tanh = self._linear("last_fc", features) + np.exp(log_std) * noise
        gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_jacobian = 2 * (math.log(2) - pre_tanh - np.logaddexp(0, -2 * pre_tanh))
        return np.tanh(pre_tanh), (gaussian - log_jacobian).sum(1)

    def _linear(self, layer: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{layer}/weight"].T + self.weights[f"{layer}/bias"]


BehaviourPolicy = UniformPolicy | TanhGaussian


def save_policy(path: Path, weights: Mapping[str, np.ndarray], facts: Mapping[str, Fact]) -> None:
    """Write the weights of a `TanhGaussian`, and what is to be known of it, to a safetensors file."""
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
    save_file(tensors, path, metadata={"facts": json.dumps(dict(facts))})


def load_policy(path: Path) -> TanhGaussian:
    """Read a file of `save_policy`; raises DydiffError for one that is missing or broken."""
    try:
        with safe_open(path, framework="numpy") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            return TanhGaussian(weights, json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError) as error:
        raise DydiffError(f"The behaviour policy {path.name} cannot be read ({error}): install dydiff anew.") from error


def shipped_policies(environment: str, role: str) -> list[TanhGaussian]:
    """Load the policies that ship for an environment in a role: "medium", "expert", or "replay-*", in the order of training.

    Raises DydiffError where there is none or as `load_policy`.
    """
    paths = sorted(SHIPPED.glob(f"{environment}-{role}.safetensors"))
    if not paths:
        raise DydiffError(f"The package lacks the behaviour policy {environment}-{role}: install dydiff anew.")
    return [load_policy(path) for path in paths]
