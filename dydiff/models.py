"""Trained models as they travel between stages: what is stored beside their weights, and how they are built from it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydiff.agents import AGENTS, Agent
from dydiff.checkpoint import load_checkpoint
from dydiff.data import Dataset, Limits, Spaces, ZScore
from dydiff.diffusion.edm import Denoiser
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.networks import build_trajectory_network
from dydiff.reward import RewardModel

DIFFUSION, DYNAMICS, REWARD, POLICY = "diffusion model", "dynamics model", "reward model", "policy"


@dataclass
class DiffusionModel:
    """A trained denoiser with the spaces and the horizon that it was trained for."""

    denoiser: Denoiser
    limits: Limits
    horizon: int
    manifest: dict[str, Any]


def build_denoiser(network: dict[str, Any], observation_dim: int) -> Denoiser:
    """Build a denoiser from its stored description (the arguments of `build_trajectory_network`)."""
    return Denoiser(build_trajectory_network(**network), observation_dim)


def load_diffusion_model(path: str | Path, dataset: Dataset | None = None, device: str = "cpu") -> DiffusionModel:
    """Load a diffusion model; with `dataset`, insist that it was trained on that very data.

    Raises:
        DydiffError: no such checkpoint, or one of another kind or another dataset.
    """
    tree, manifest = _load(path, DIFFUSION, dataset)
    denoiser = build_denoiser(manifest["network"], manifest["observation_dim"])
    denoiser.network.load_state_dict(tree["weights"])
    limits = Limits(tree["limits"]["minimum"], tree["limits"]["maximum"])
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    return DiffusionModel(denoiser, limits.to(device), manifest["network"]["horizon"], manifest)


def load_dynamics(path: str | Path, dataset: Dataset | None = None, device: str = "cpu") -> DynamicsEnsemble:
    """Load a dynamics ensemble; raises as `load_diffusion_model`."""
    tree, manifest = _load(path, DYNAMICS, dataset)
    model = DynamicsEnsemble(**manifest["model"])
    model.load_state_dict(tree)
    return model.to(device).eval().requires_grad_(False)


def load_reward(path: str | Path, dataset: Dataset | None = None, device: str = "cpu") -> RewardModel:
    """Load a reward model; raises as `load_diffusion_model`."""
    tree, manifest = _load(path, REWARD, dataset)
    model = RewardModel(**manifest["model"])
    model.load_state_dict(tree)
    return model.to(device).eval().requires_grad_(False)


@dataclass
class Policy:
    """A trained agent with its spaces; `policy(observation)` acts in raw space, [n, O] -> [n, A] numpy arrays."""

    agent: Agent
    spaces: Spaces
    manifest: dict[str, Any]

    def __call__(self, observation: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        return act_raw(self.agent, self.spaces, observation, generator)


def load_policy(path: str | Path, device: str = "cpu") -> Policy:
    """Load a policy checkpoint (`agent.safetensors`, `agent-best.safetensors`, ...); raises as `load_diffusion_model`."""
    tree, manifest = _load(path, POLICY, None)
    agent = AGENTS[manifest["algorithm"]](**manifest["model"], device=device)
    agent.load_state_dict(tree["agent"])
    return Policy(agent, restore_spaces(tree["spaces"]).to(device), manifest)


def store_spaces(spaces: Spaces) -> dict[str, Any]:
    """The numbers that define the spaces, for a checkpoint."""
    limits = (spaces.observation_limits, spaces.action_limits)
    center, half_range = spaces.action_center, spaces.action_half_range
    return {
        "minimum": torch.cat([part.minimum for part in limits]),
        "maximum": torch.cat([part.maximum for part in limits]),
        "mean": spaces.z_score.mean,
        "std": spaces.z_score.std,
        "action_low": center - half_range,
        "action_high": center + half_range,
    }


def restore_spaces(stored: dict[str, Any]) -> Spaces:
    """The inverse of `store_spaces`."""
    limits, z_score = Limits(stored["minimum"], stored["maximum"]), ZScore(stored["mean"], stored["std"])
    return Spaces(limits, z_score, stored["action_low"], stored["action_high"])


@torch.no_grad()
def act_raw(agent: Agent, spaces: Spaces, observation: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
    """The evaluation action of an agent for raw observations: [n, O] -> [n, A] numpy arrays."""
    policy_observation = spaces.observation_raw_to_policy(torch.as_tensor(observation, dtype=torch.float32).to(spaces.device))
    action = agent.act_for_evaluation(policy_observation, generator)
    return spaces.action_policy_to_raw(action).cpu().numpy()


def _load(path: str | Path, kind: str, dataset: Dataset | None) -> tuple[Any, dict[str, Any]]:
    tree, manifest = load_checkpoint(Path(path), kind)
    if dataset is not None and manifest["fingerprint"] != dataset.fingerprint:
        raise DydiffError(
            f"The {kind} '{path}' was trained on dataset '{manifest['dataset']}' (fingerprint {manifest['fingerprint'][:12]}), "
            f"not on '{dataset.name}' ({dataset.fingerprint[:12]}). Its scaling would be silently wrong; "
            "train one on this dataset."
        )
    return tree, manifest
