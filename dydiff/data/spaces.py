"""The three spaces (raw, policy, model), and the one place where numbers pass from one to another.

raw: as the environment gives and takes them. policy: observations z-scored, actions in [-1, 1]. model: observations and
actions scaled to the dataset's limits, where the diffusion model lives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dydiff.data.dataset import Dataset
from dydiff.data.transitions import Transitions
from dydiff.errors import DydiffError

EPSILON = torch.finfo(torch.float32).eps
ROWS_PER_CHUNK = 1 << 16  # bounds the memory of float64 statistics over millions of rows


class Limits(nn.Module):
    """Scale each of D columns from [minimum, maximum] to [-1, 1]; a constant column maps to 0 and back to its constant.

    Raises DydiffError where the two do not fit together, or a minimum lies above its maximum.
    """

    def __init__(self, minimum: Tensor | np.ndarray, maximum: Tensor | np.ndarray):
        super().__init__()
        minimum, maximum = _to_buffer(minimum), _to_buffer(maximum)  # [D]
        if minimum.ndim != 1 or minimum.shape != maximum.shape:
            raise DydiffError(
                "Limits need a minimum and a maximum per column, "
                f"not shapes {tuple(minimum.shape)} and {tuple(maximum.shape)}."
            )
        if not bool((minimum <= maximum).all()):
            raise DydiffError("Limits need minimum <= maximum in every column, and no NaN.")
        self.register_buffer("minimum", minimum)
        self.register_buffer("maximum", maximum)
        # Derived from the two above, once; in their own buffers so that a conversion costs a few operations per element.
        width = maximum.double() - minimum.double()
        scale = 2.0 / width
        constant = scale > torch.finfo(torch.float32).max  # no width, or too little for float32 to invert
        self.register_buffer("scale", torch.where(constant, 0.0, scale).float(), persistent=False)
        self.register_buffer("offset", torch.where(constant, 0.0, -1.0).float(), persistent=False)
        self.register_buffer("half_range", torch.where(constant, 0.0, 0.5 * width).float(), persistent=False)

    @classmethod
    def from_dataset(cls, dataset: Dataset, include_action: bool = True) -> Limits:
        """Take the limits over all rows of a dataset: O observation columns, then (if included) A action columns."""
        parts = [dataset.observations, dataset.actions] if include_action else [dataset.observations]
        minimum = np.concatenate([part.min(axis=0) for part in parts])
        maximum = np.concatenate([part.max(axis=0) for part in parts])
        return cls(minimum, maximum)

    @property
    def dim(self) -> int:
        """D, the number of columns."""
        return self.minimum.numel()

    def part(self, columns: slice) -> Limits:
        """Return the limits of some of the columns."""
        return Limits(self.minimum[columns], self.maximum[columns])

    def normalize(self, raw: Tensor) -> Tensor:
        """Scale raw [..., D] to model space; not clipped."""
        return torch.addcmul(self.offset, raw - self.minimum, self.scale)

    def unnormalize(self, model: Tensor) -> Tensor:
        """Clip model-space values [..., D] to [-1, 1] and scale them back to raw."""
        return torch.addcmul(self.minimum, model.clamp(-1.0, 1.0) + 1.0, self.half_range)


class ZScore(nn.Module):
    """Standardise observations: `(o - mean) / (std + eps)`, and back with `o * std + mean` (eps: of float32).

    Raises DydiffError where the two do not fit together, or a std is negative.
    """

    def __init__(self, mean: Tensor | np.ndarray, std: Tensor | np.ndarray):
        super().__init__()
        mean, std = _to_buffer(mean), _to_buffer(std)  # [O]
        if mean.ndim != 1 or mean.shape != std.shape:
            raise DydiffError(
                f"A z-score needs a mean and a std per column, not shapes {tuple(mean.shape)} and {tuple(std.shape)}."
            )
        if not bool((std >= 0).all()):
            raise DydiffError("A z-score needs std >= 0 in every column, and no NaN.")
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("inverse_std", (1.0 / (std.double() + EPSILON)).float(), persistent=False)  # derived, once

    @classmethod
    def from_transitions(cls, transitions: Transitions) -> ZScore:
        """Take mean and population standard deviation over the observations [N, O] of raw transitions (numpy)."""
        observation = transitions.observation
        chunks = [observation[row : row + ROWS_PER_CHUNK] for row in range(0, len(observation), ROWS_PER_CHUNK)]
        mean = sum(chunk.sum(axis=0, dtype=np.float64) for chunk in chunks) / len(observation)
        square = sum(np.square(chunk - mean).sum(axis=0) for chunk in chunks) / len(observation)
        return cls(mean, np.sqrt(square))

    @property
    def dim(self) -> int:
        """O, the number of columns."""
        return self.mean.numel()

    def normalize(self, raw: Tensor) -> Tensor:
        """Standardise raw observations [..., O]."""
        return (raw - self.mean) * self.inverse_std

    def unnormalize(self, policy: Tensor) -> Tensor:
        """Bring policy-space observations [..., O] back to raw."""
        return torch.addcmul(self.mean, policy, self.std)


class _Affine(nn.Module):
    """x * factor + shift by column, in one operation: what a chain of conversions comes to, rounded once."""

    def __init__(self, factor: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("factor", factor.float(), persistent=False)
        self.register_buffer("shift", shift.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.factor)


class Spaces(nn.Module):
    """Every conversion between raw, policy and model space for O observation and A action columns.

    limits: of O + A columns, observations first; z_score: of O columns; action_low, action_high: [A], the environment's
    action range in raw units. All conversions take and return tensors [..., O] or [..., A], keep to the device, and
    are exact for actions whose range is already [-1, 1]. Raises DydiffError where the widths do not fit together.
    """

    def __init__(
        self,
        limits: Limits,
        z_score: ZScore,
        action_low: Tensor | np.ndarray,
        action_high: Tensor | np.ndarray,
    ):
        super().__init__()
        low, high = _to_buffer(action_low), _to_buffer(action_high)  # [A]
        if low.ndim != 1 or low.shape != high.shape or not bool((low < high).all()):
            raise DydiffError(
                f"The action range must have low < high in every column, not {low.tolist()} and {high.tolist()}."
            )
        self.observation_dim, self.action_dim = z_score.dim, low.numel()
        if limits.dim != self.observation_dim + self.action_dim:
            raise DydiffError(
                f"The model's limits have {limits.dim} columns, but the environment has {self.observation_dim} "
                f"observation and {self.action_dim} action columns. Use a diffusion model that was trained on this "
                "environment, with include_action."
            )
        self.observation_limits = limits.part(slice(0, self.observation_dim))
        self.action_limits = limits.part(slice(self.observation_dim, None))
        self.z_score = z_score
        self.register_buffer("action_center", 0.5 * (high + low))
        self.register_buffer("action_half_range", 0.5 * (high - low))
        # A rollout changes between policy and model space four times a step, so these are one operation and not three to five.
        mean, std, inverse_std = (each.double() for each in (z_score.mean, z_score.std, z_score.inverse_std))
        self._observation_to_model, self._observation_to_policy = _between(self.observation_limits, mean, std, inverse_std)
        center, half = self.action_center.double(), self.action_half_range.double()
        self._action_to_model, self._action_to_policy = _between(self.action_limits, center, half, 1.0 / half)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        transitions: Transitions,
        action_low: Tensor | np.ndarray,
        action_high: Tensor | np.ndarray,
    ) -> Spaces:
        """Take the limits over all rows of a dataset and the z-score over its raw transitions."""
        limits, z_score = Limits.from_dataset(dataset), ZScore.from_transitions(transitions)
        return cls(limits, z_score, action_low, action_high)

    @property
    def device(self) -> torch.device:
        """Where the conversions work."""
        return self.action_center.device

    def observation_raw_to_policy(self, observation: Tensor) -> Tensor:
        """Standardise raw observations."""
        return self.z_score.normalize(observation)

    def observation_policy_to_raw(self, observation: Tensor) -> Tensor:
        """Bring standardised observations back to the environment's units."""
        return self.z_score.unnormalize(observation)

    def observation_policy_to_model(self, observation: Tensor) -> Tensor:
        """Turn standardised observations into limits-scaled ones; not clipped."""
        return self._observation_to_model(observation)

    def observation_model_to_policy(self, observation: Tensor) -> Tensor:
        """Clip limits-scaled observations to [-1, 1] and standardise them."""
        return self._observation_to_policy(observation.clamp(-1.0, 1.0))

    def action_raw_to_policy(self, action: Tensor) -> Tensor:
        """Scale raw actions from the environment's range to [-1, 1]; not clipped."""
        return (action - self.action_center) / self.action_half_range

    def action_policy_to_raw(self, action: Tensor) -> Tensor:
        """Scale actions from [-1, 1] to the environment's range."""
        return torch.addcmul(self.action_center, action, self.action_half_range)

    def action_policy_to_model(self, action: Tensor) -> Tensor:
        """Turn actions in [-1, 1] into limits-scaled ones; not clipped."""
        return self._action_to_model(action)

    def action_model_to_policy(self, action: Tensor) -> Tensor:
        """Clip limits-scaled actions to the dataset's limits and scale them to the policy's [-1, 1]."""
        return self._action_to_policy(action.clamp(-1.0, 1.0))

    @torch.no_grad()
    def transitions_to_policy(self, transitions: Transitions, device: torch.device | str) -> Transitions:
        """Turn raw numpy transitions into float32 tensors in policy space on `device` (terminal: 0 or 1)."""

        def load(values: np.ndarray) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        return Transitions(
            observation=self.observation_raw_to_policy(load(transitions.observation)).to(device),
            action=self.action_raw_to_policy(load(transitions.action)).to(device),
            reward=load(transitions.reward).to(device),
            next_observation=self.observation_raw_to_policy(load(transitions.next_observation)).to(device),
            terminal=load(transitions.terminal).to(device),
        )


def _between(limits: Limits, center: Tensor, spread: Tensor, inverse_spread: Tensor) -> tuple[_Affine, _Affine]:
    """From a space whose raw values are center + spread x to model space, and back (of clipped values); float64 columns."""
    minimum, scale, half_range = limits.minimum.double(), limits.scale.double(), limits.half_range.double()
    to_model = _Affine(spread * scale, limits.offset.double() + (center - minimum) * scale)
    back = _Affine(half_range * inverse_spread, (minimum + half_range - center) * inverse_spread)
    return to_model, back


def _to_buffer(values: Tensor | np.ndarray) -> Tensor:
    """Copy to float32: a buffer must not share memory with the caller's array."""
    return torch.as_tensor(values).detach().to(torch.float32).clone()
