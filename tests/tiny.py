"""The smallest settings with which every stage still does all of its work, as command lines."""

from __future__ import annotations

from pathlib import Path

import yaml

TRAIN = "--max_length_of_trajectory=8 --batch=8 --duration=0.0004 --tick=0.04 --dump=1 --dim=16 --device=cpu".split()

SECTIONS = {
    "dynamics": {"dyn_model_params": {"hidden_dims": [8], "weight_decay": [0, 1e-4], "num_nets": 3, "num_elites": 2}},
    "reward": {"model_params": {"hidden_dims": [8]}},
    "td3_bc": {"td3_bc_params": {"hidden_dims": [8]}},
    "diffusion_ql": {"diffql_params": {"hidden_dims": [8], "lr_decay": True}},
    "cql": {"cql_params": {"hidden_dims": [8], "num_random": 2}},
}
ONE_STEP = {"max_epochs": 10, "steps_per_epoch": 5, "batch_size": 32, "lr": 1e-3}
POLICY = {
    "num_epochs": 8,
    "num_train_steps_per_train_call": 4,
    "num_steps_per_eval": 10,
    "max_path_length": 5,
    "evaluation_worker": False,  # starting one takes longer than these runs
    "batch_size": 16,
    "rollout_batch_size": 12,
    "each_rollout_size": 8,
    "model_replay_buffer_size": 150,  # wraps within a run
    "freq_saving": 3,
}


def write_experiment(path: Path, stage: str, dataset: str, variables: dict | None = None) -> Path:
    """Write a tiny experiment file for one stage."""
    sections = {name: {**values} for name, values in SECTIONS[stage].items()}
    if stage in ("dynamics", "reward"):
        for section in sections.values():
            section.update(ONE_STEP)
    else:
        sections |= {"rl_trainer_params": POLICY, "sampler_kwargs": {"num_steps": 3}}
    content = {"meta_data": {"exp_name": stage}, "constants": {"dataset_name": dataset, **sections}}
    path.write_text(yaml.safe_dump({**content, **({"variables": variables} if variables else {})}))
    return path
