"""dydiff: policy-injected trajectory diffusion for offline reinforcement learning (DyDiff, arXiv 2405.19189).

The names below are the library; they are imported when first used, so that `import dydiff` and `dydiff --help` are instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AGENTS": "dydiff.agents",
    "CQL": "dydiff.agents",
    "Dataset": "dydiff.data",
    "Denoiser": "dydiff.diffusion.edm",
    "DiffusionQL": "dydiff.agents",
    "DydiffError": "dydiff.errors",
    "DynamicsEnsemble": "dydiff.dynamics",
    "Evaluator": "dydiff.evaluate",
    "FastMode": "dydiff.diffusion.fast_sampler",
    "Fit": "dydiff.fit",
    "Limits": "dydiff.data",
    "ReplayBuffer": "dydiff.replay",
    "RewardModel": "dydiff.reward",
    "RolloutEngine": "dydiff.rollout",
    "Spaces": "dydiff.data",
    "TD3BC": "dydiff.agents",
    "Trajectory": "dydiff.rollout",
    "Transitions": "dydiff.data",
    "Windows": "dydiff.data",
    "ZScore": "dydiff.data",
    "download_dataset": "dydiff.data",
    "environment_spec": "dydiff.environments",
    "keep_mask": "dydiff.filters",
    "load_dataset": "dydiff.data",
    "load_diffusion_model": "dydiff.models",
    "load_dynamics": "dydiff.models",
    "load_policy": "dydiff.models",
    "load_problem": "dydiff.problem",
    "load_reward": "dydiff.models",
    "make_synthetic_transitions": "dydiff.rollout",
    "make_transitions": "dydiff.data",
    "normalized_score": "dydiff.data",
    "sample_edm": "dydiff.diffusion.sampler",
    "sample_fast": "dydiff.diffusion.fast_sampler",
    "score": "dydiff.rollout",
    "terminal_function": "dydiff.environments.terminal",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dydiff' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
