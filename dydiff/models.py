"""Trained models as they travel between stages: what is stored beside their weights, and how they are built from it again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dydiff.agents import AGENTS, Agent
from dydiff.arguments import as_rows, describe
from dydiff.checkpoint import load_checkpoint
from dydiff.data import Dataset, Limits, Spaces, ZScore
from dydiff.device import find_device
from dydiff.diffusion.edm import Denoiser
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.finite import find_not_finite
from dydiff.memory import is_out_of_memory
from dydiff.networks import build_trajectory_network
from dydiff.reward import RewardModel

OneStep = TypeVar("OneStep", DynamicsEnsemble, RewardModel)

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
    """Load a diffusion model; with `dataset`, insist that it was trained on that very data and its limits.

    Raises:
        DydiffError: no such checkpoint or device, one of another kind, dataset or scaling, or one whose content does not fit
            together.
    """
    tree, manifest = _load(path, DIFFUSION, dataset, device)
    with _consistent(path):
        denoiser = build_denoiser(manifest["network"], manifest["observation_dim"])
        denoiser.network.load_state_dict(tree["weights"])
        limits = Limits(tree["limits"]["minimum"], tree["limits"]["maximum"])
        denoiser = denoiser.to(device).eval().requires_grad_(False)
        denoiser.manifest = manifest  # what rollouts need to know of its training goes wherever it goes
        model = DiffusionModel(denoiser, limits.to(device), manifest["network"]["horizon"], manifest)
        if dataset is not None:
            ours = Limits.from_dataset(dataset, manifest["include_action"])
            _check_scaling(path, DIFFUSION, tree["limits"], ours.state_dict())
    return model


def load_dynamics(
    path: str | Path, dataset: Dataset | None = None, device: str = "cpu", spaces: Spaces | None = None
) -> DynamicsEnsemble:
    """Load a dynamics ensemble; with `spaces`, insist on their scaling. Raises as `load_diffusion_model`."""
    return _load_one_step(path, DYNAMICS, DynamicsEnsemble, dataset, device, spaces)


def load_reward(
    path: str | Path, dataset: Dataset | None = None, device: str = "cpu", spaces: Spaces | None = None
) -> RewardModel:
    """Load a reward model; with `spaces`, insist on their scaling. Raises as `load_diffusion_model`."""
    return _load_one_step(path, REWARD, RewardModel, dataset, device, spaces)


@dataclass(eq=False)  # captured rollouts belong to a policy itself
class Policy:
    """A trained agent with its spaces; `policy(observation)` acts in raw space, [n, O] -> [n, A] numpy arrays.

    Actions that are drawn come from `generator`; without one, from a generator of its own, made with seed 0 when it was loaded.
    DydiffError for something else in its place.
    """

    agent: Agent
    spaces: Spaces
    manifest: dict[str, Any]

    def __post_init__(self):
        self._own_generator = torch.Generator().manual_seed(0)

    def __call__(self, observation: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        if not isinstance(generator, torch.Generator | None):
            raise DydiffError(f"generator must be a torch.Generator, or None for the policy's own, not {describe(generator)}.")
        act = partial(self.agent.act_for_evaluation, generator=generator or self._own_generator)
        return in_raw_space(act, self.spaces)(observation)

    def act(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As rollouts take it, in policy space: observation [B, O] -> action [B, A]."""
        return self.agent.act(observation, generator)


def load_policy(path: str | Path, device: str = "cpu", agent: type[Agent] | None = None) -> Policy:
    """Load a policy checkpoint (`agent.safetensors`, `agent-best.safetensors`, ...); raises as `load_diffusion_model`.

    The class of an algorithm that is not dydiff's must be given as `agent`: a checkpoint imports nothing.
    """
    tree, manifest = _load(path, POLICY, None, device)
    own = ":" in str(manifest["algorithm"])
    if own != (agent is not None):
        takes = "must be given: load_policy(path, agent=...)" if own else "cannot be another: leave `agent` out"
        raise DydiffError(f"Policy '{path}' was trained by {manifest['algorithm']}, whose class {takes}.")
    with _consistent(path):
        build = AGENTS[manifest["algorithm"]] if agent is None else agent
        agent = build(**manifest["model"], device=device)
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


def describe_scaling(spaces: Spaces) -> dict[str, list[float]]:
    """The numbers between raw and policy space, for the manifest of a model that lives in policy space."""
    stored = store_spaces(spaces)
    return {name: stored[name].tolist() for name in ("mean", "std", "action_low", "action_high")}


def restore_spaces(stored: dict[str, Any]) -> Spaces:
    """The inverse of `store_spaces`."""
    limits, z_score = Limits(stored["minimum"], stored["maximum"]), ZScore(stored["mean"], stored["std"])
    return Spaces(limits, z_score, stored["action_low"], stored["action_high"])


def in_raw_space(policy: Callable[[Tensor], Tensor], spaces: Spaces) -> Callable[[np.ndarray], np.ndarray]:
    """A policy as simulators take it: raw observations [n, O] -> raw actions [n, A], numpy arrays.

    Raises, when it acts:
        DydiffError: observations or the policy's actions of another shape.
    """
    one_each = "It holds the action, in [-1, 1], of every observation that the policy was given."

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        try:
            raw, given = torch.as_tensor(observation, dtype=torch.float32), None
        except (TypeError, ValueError, RuntimeError):
            given = describe(observation)
        if given or raw.ndim != 2 or raw.shape[1] != spaces.observation_dim:
            wanted = f"an array of numbers [n, {spaces.observation_dim}], one observation a row"
            raise DydiffError(f"observation must be {wanted}, not {given or f'one {list(raw.shape)}'}.")
        rows = spaces.observation_raw_to_policy(raw.to(spaces.device))
        action = as_rows("What the policy returns", policy(rows), len(rows), spaces.action_dim, rows.device, one_each)
        return spaces.action_policy_to_raw(action).cpu().numpy()

    return act


def _load_one_step(
    path: str | Path, kind: str, build: type[OneStep], dataset: Dataset | None, device: str, spaces: Spaces | None
) -> OneStep:
    tree, manifest = _load(path, kind, dataset, device)
    with _consistent(path):
        if spaces is not None and "scaling" in manifest:  # published files do not tell theirs
            _check_scaling(path, kind, manifest["scaling"], describe_scaling(spaces))
        model = build(**manifest["model"])
        model.load_state_dict(tree)
        return model.to(device).eval().requires_grad_(False)


def _load(path: str | Path, kind: str, dataset: Dataset | None, device: str) -> tuple[Any, dict[str, Any]]:
    find_device(device)
    file = Path(os.path.expanduser(path))
    if file.is_dir():  # a run
        file /= "agent.safetensors" if kind == POLICY else "model.safetensors"
    tree, manifest = load_checkpoint(file, kind)
    if not isinstance(dataset, Dataset | None):
        raise DydiffError(f"dataset must be what load_dataset gives, such as problem.dataset, not {describe(dataset)}.")
    if dataset is not None and manifest.get("fingerprint") != dataset.fingerprint:
        raise DydiffError(
            f"The {kind} '{path}' was trained on dataset '{manifest.get('dataset')}' (fingerprint "
            f"{str(manifest.get('fingerprint'))[:12]}), not on '{dataset.name}' ({dataset.fingerprint[:12]}). Its scaling would "
            "be silently wrong; train one on this dataset."
        )
    if tensor := find_not_finite(tree):
        raise DydiffError(f"The {kind} '{path}' holds a NaN or an infinity in '{tensor}'. Use an earlier one, or train again.")
    return tree, manifest


def _check_scaling(path: str | Path, kind: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a model that scales its inputs otherwise. Statistics may differ in their last bits from machine to machine."""
    for name in theirs:
        pair = [torch.as_tensor(scaling[name], dtype=torch.float64, device="cpu") for scaling in (theirs, ours)]
        if pair[0].shape != pair[1].shape or not torch.allclose(*pair, rtol=1e-3, atol=1e-6):
            raise DydiffError(
                f"The {kind} '{path}' scales by another {name} of the columns than this run does, so that its numbers would be "
                "silently wrong. Train one with this run's dataset and environment."
            )


@contextlib.contextmanager
def _consistent(path: str | Path) -> Iterator[None]:
    """Tell one paragraph where a checkpoint's manifest and tensors contradict each other: it may come from anywhere."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DydiffError(f"What '{path}' holds does not fit its own manifest ({reason}). Get it again, or train again.") from error
