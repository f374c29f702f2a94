"""Every setting, once: typed dataclasses with their defaults, and the ranges of their values.

The names are those of the experiment files that people already have (SPEC section 9); `experiments.settings` fills them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class MetaData:
    """How an experiment is run: its name, and the processes and GPUs that share its variants."""

    exp_name: str = "experiment"  # run folders are named after it
    description: str = ""  # free text, kept with the run
    script_path: str = (
        ""  # older files name a script here; the sections present decide what runs, and a contradiction is an error
    )
    gpu: list[int] = field(default_factory=list)  # ids, dealt to the workers in turn; none: the first GPU, or else the CPU
    num_workers: int = 1  # variants that run side by side


@dataclass
class KeepCondition:
    """Which rollouts are kept (SPEC section 6)."""

    filter_type: Literal["softmax", "hardmax"] = "softmax"  # softmax: sampled by score; hardmax: the best ones
    threshold: float = 0.6  # fraction of the rollouts that is kept
    softmax_temp: float = 0.05  # temperature of the softmax filter, on standardised scores


@dataclass
class RLTrainerParams:
    """The policy-training loop (SPEC sections 6 and 7)."""

    num_epochs: int = 2000  # epochs of rollout, updates, evaluation
    num_train_steps_per_train_call: int | None = None  # updates an epoch; None: 500, or 250 for Diffusion-QL
    num_steps_per_eval: int = 5000  # environment steps an evaluation takes at least
    max_path_length: int = 1000  # longest evaluation episode
    batch_size: int = 256  # transitions an update
    replay_buffer_size: int = 2_000_000  # cap on real transitions; the newest rows of a larger dataset are used
    model_replay_buffer_size: int = 2_000_000  # ring buffer of synthetic transitions
    rollout_batch_size: int = 2048  # start states of one rollout
    each_rollout_size: int = 2048  # of these, how many are computed at a time (memory)
    real_ratio: float = 0.6  # fraction of real transitions in a batch; 1: the base algorithm, no rollouts
    rollout_length: int = -1  # rows of a rollout that are used; -1: the diffusion model's horizon
    rollout_freq: int = 1  # epochs from one rollout to the next
    eval_freq: int = 1  # epochs from one evaluation to the next
    evaluation_worker: bool | None = None  # evaluate in a process beside the next epoch; None: where a core is idle
    update_mode: Literal["auto", "eager", "compiled", "graph"] = "auto"  # Inductor, CUDA graphs; auto: what pays off
    update_precision: Literal["float32", "bf16"] = "float32"  # of the updates' matrix products; weights stay float32
    save_best: bool = True  # keep the policy with the best evaluation as agent-best.safetensors
    freq_saving: int = 10  # epochs from one periodic checkpoint (and resume state) to the next
    save_replay_buffer: bool = False  # put the real transitions into the checkpoints, all but the best one
    save_model_replay_buffer: bool = False  # put the synthetic transitions into them
    keep_condition: KeepCondition = field(default_factory=KeepCondition)


@dataclass
class SamplerKwargs:
    """The stochastic Heun sampler, or fast mode in its place, and the number of policy injections (SPEC sections 3 and 5)."""

    S_churn: float = 60.0  # amount of noise added back
    S_min: float = 0.36995  # noise levels between S_min ...
    S_max: float = 52.242  # ... and S_max are churned
    S_noise: float = 1.002  # inflation of the added noise
    inpaint_churn: bool = False  # overwrite start and actions behind the churn too (published: its noise stays on them)
    num_steps: int = 34  # noise levels; 2 num_steps - 1 network evaluations
    iterative_times: int = 2  # policy injections after the autoregressive start
    backend: str = "auto"  # what evaluates the network, one of those that dydiff/backends explains
    fast: bool = False  # DPM-Solver++ in place of all S_* and num_steps: far fewer evaluations, other samples
    fast_first_evaluations: int = 8  # fast mode: network evaluations of the first policy injection
    fast_warm_sigma: float = 0.8  # fast mode: noise level put on the current guess, from which later injections start
    fast_warm_evaluations: int = 3  # fast mode: network evaluations of each later injection


@dataclass
class ModelParams:
    """The reward model (SPEC section 4)."""

    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])  # hidden widths
    lr: float = 1e-4  # Adam's step size
    batch_size: int = 256  # transitions an update
    patience: int = 7  # epochs without improvement before training stops
    max_epochs: int = 1000  # cap on the epochs
    steps_per_epoch: int | None = None  # updates an epoch; None: once through the data
    load_path: str = "auto"  # trained model for a DyDiff run: file, run folder, or auto = newest finished run on the dataset


@dataclass
class DynModelParams:
    """The single-step dynamics ensemble (SPEC section 4)."""

    num_nets: int = 7  # networks in the ensemble
    num_elites: int = 5  # of these, the best on held-out data predict
    hidden_dims: list[int] = field(default_factory=lambda: [200, 200, 200, 200])  # hidden widths
    weight_decay: list[float] = field(default_factory=lambda: [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4])  # by layer
    learn_log_var_bounds: bool = False  # learn the clamp of the log-variance, as the original ensembles do
    lr: float = 1e-4  # Adam's step size
    batch_size: int = 256  # transitions an update and network
    patience: int = 7  # epochs in which no network improved before training stops
    max_epochs: int = 1000  # cap on the epochs
    steps_per_epoch: int | None = None  # updates an epoch; None: once through the data
    load_path: str = "auto"  # trained model for a DyDiff run: file, run folder, or auto = newest finished run on the dataset


@dataclass
class DiffModelParams:
    """The diffusion model of a DyDiff run."""

    model_paths: list[str] | str = "auto"  # checkpoints or run folders (several: an ensemble); auto = newest finished run


@dataclass
class TD3BCParams:
    """TD3+BC (SPEC section 7; arXiv 2106.06860)."""

    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])  # of policy and critics
    discount: float = 0.99  # gamma
    tau: float = 0.005  # how far targets move at a policy update
    alpha: float = 2.5  # weight of Q against behaviour cloning
    policy_freq: int = 2  # critic updates per policy update
    policy_lr: float = 3e-4  # Adam's step size of the policy
    qf_lr: float = 3e-4  # Adam's step size of the critics


@dataclass
class DiffQLParams:
    """Diffusion-QL (SPEC section 7; arXiv 2208.06193)."""

    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])  # of the critics
    discount: float = 0.99  # gamma
    tau: float = 0.005  # how far critic targets move at every update
    eta: float = 1.0  # weight of the Q-loss
    lr: float = 3e-4  # Adam's step size of actor and critics
    grad_norm: float = 5.0  # gradient-norm clip; 0: none
    n_timesteps: int = 5  # denoising steps of the actor
    beta_schedule: Literal["vp", "linear", "cosine"] = "vp"  # of the noise in the actor
    max_q_backup: bool = False  # back up the best of 10 sampled next actions
    lr_decay: bool = False  # cosine learning-rate decay over the epochs


@dataclass
class CQLParams:
    """CQL on SAC (arXiv 2006.04779)."""

    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])  # of policy and critics
    discount: float = 0.99  # gamma
    tau: float = 0.005  # how far targets move at every update
    policy_lr: float = 1e-4  # Adam's step size of the policy
    qf_lr: float = 3e-4  # Adam's step size of the critics
    min_q_weight: float = 5.0  # weight of the conservative term
    num_random: int = 10  # sampled actions per state in the conservative term


@dataclass
class AgentParams:
    """An algorithm of your own (README, "Your own algorithm")."""

    agent: str = ""  # its class, module:Class; the module may lie in the working folder
    arguments: dict[str, Any] = field(default_factory=dict)  # what its constructor takes besides sizes, device and generator


@dataclass
class EnvSpecs:
    """Where the policy is evaluated."""

    env_name: str | None = None  # a known name, a gymnasium id (module:Name-v0 imports the module) or none; None: the dataset's
    backend: str | None = None  # simulator, see dydiff/environments/spec.py; None: the one that the dataset was made with
    terminal_function: str | None = None  # of rollouts: module:function, or never; None: the environment's
    env_num: int | None = None  # environments stepped in lockstep; None: as many episodes as an evaluation needs
    eval_env_seed: int | None = None  # seed of the evaluation episodes; None: the run's seed


@dataclass
class Constants:
    """One variant of an experiment, fully resolved. A section that is None was not asked for."""

    dataset_name: str = ""  # D4RL name, local name or path
    seed: int = 0  # of everything random in the run
    seeds: list[int] | None = None  # policies: train these seeds together, in place of `seed`; a run folder each, as if alone
    rl_trainer_params: RLTrainerParams = field(default_factory=RLTrainerParams)
    model_params: ModelParams | None = None
    dyn_model_params: DynModelParams | None = None
    diff_model_params: DiffModelParams = field(default_factory=DiffModelParams)
    td3_bc_params: TD3BCParams | None = None
    diffql_params: DiffQLParams | None = None
    cql_params: CQLParams | None = None
    agent_params: AgentParams | None = None
    env_specs: EnvSpecs = field(default_factory=EnvSpecs)
    sampler_kwargs: SamplerKwargs = field(default_factory=SamplerKwargs)


SMALLEST, LARGEST = 5e-324, sys.float_info.max
# What numbers may be, ends included; a setting that is not listed must be above 0.
RANGES = {
    "seed": (0, 2**63 - 1),
    "seeds": (0, 2**63 - 1),
    "eval_env_seed": (0, 2**63 - 1),
    "gpu": (0, LARGEST),
    "real_ratio": (0, 1),
    "rollout_length": (-1, LARGEST),
    "threshold": (SMALLEST, 1),
    "softmax_temp": (-LARGEST, LARGEST),
    "iterative_times": (0, LARGEST),
    "num_steps": (2, LARGEST),
    "fast_first_evaluations": (2, LARGEST),
    "fast_warm_evaluations": (2, LARGEST),
    "S_churn": (0, LARGEST),
    "S_min": (0, LARGEST),
    "S_max": (0, math.inf),
    "S_noise": (0, LARGEST),
    "weight_decay": (0, LARGEST),
    "discount": (0, 1),
    "tau": (0, 1),
    "alpha": (0, LARGEST),
    "eta": (0, LARGEST),
    "grad_norm": (0, LARGEST),
    "min_q_weight": (0, LARGEST),
}
PATHS = ("load_path", "model_paths")  # settings in which `~` is the home folder
SINGLES = ("gpu",)  # lists in whose place one element may stand
