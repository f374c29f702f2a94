"""Is this the published method? Runs every recorded case in a folder through dydiff's public code and compares the numbers.

    python tests/conformance.py DIR [--backend NAME | all] [--mode NAME | all] [--device cuda]

Each case is an .npz: `meta` (JSON: kind and settings), inputs, weights under published names, expected outputs. One line per
case (and backend, for the sampler and rollout kinds; and mode, for updates); exit status 1 on any failure or unknown kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dydiff.agents.diffusion_actor import PUBLISHED_NAMES, DiffusionActor
from dydiff.agents.diffusion_ql import DiffusionQL, DiffusionQLNoise
from dydiff.agents.td3_bc import TD3BC
from dydiff.backends import BACKENDS, IN_16_BIT, is_available, prepare_denoiser
from dydiff.capture import CapturedGraph, can_compile, compile_function, trace_gradients, warm_up
from dydiff.data import Limits, Spaces, Transitions, Windows, ZScore, dataset_from_arrays, make_transitions
from dydiff.diffusion.edm import Denoiser, edm_loss
from dydiff.diffusion.sampler import sample_edm
from dydiff.dynamics import DynamicsEnsemble
from dydiff.filters import hardmax_mask, softmax_probability
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.networks.published import rename_unet
from dydiff.networks.unet import UNet
from dydiff.replay import split_rows
from dydiff.reward import RewardModel
from dydiff.rollout import RolloutEngine, Trajectory, make_synthetic_transitions
from dydiff.terminal import terminal_function
from dydiff.updates import MODES

AGENT_KINDS = ("td3bc", "diffql")
LIMITS_16_BIT = {"edm_sample": 2e-2, "rollout": 2e-2}  # for backends that compute in fp16 or bf16
FIELDS = dict(zip(Transitions._fields, ("observations", "actions", "rewards", "next_observations", "terminals"), strict=True))


class Case:
    """One file: `case[name]` is an array as a tensor, `case.meta` the settings."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.device = device
        with np.load(path, allow_pickle=False) as file:
            self.meta = json.loads(str(file["meta"]))
            self.arrays = {name: file[name] for name in file.files if name != "meta"}

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name], device=self.device)

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.arrays else None

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Every array below a prefix such as `w/`, by the rest of its name."""
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}


Pair = tuple[Tensor, Tensor]  # ours, expected


def read_denoiser(case: Case, weights: str = "w/") -> Denoiser:
    meta = case.meta
    network = UNet(meta["data_dim"], meta["horizon"], meta["dim"], meta["dim_mults"], meta["kernel_size"])
    network.load_state_dict(rename_unet(case.under(weights)))
    return Denoiser(network, meta["observation_dim"], meta["sigma_data"]).eval().requires_grad_(False).to(case.device)


def read_dynamics(case: Case, settings: dict, weights: str, bounds: dict) -> DynamicsEnsemble:
    observation_dim = case.meta["observation_dim"]
    layers = len(settings["hidden"]) + 1
    model = DynamicsEnsemble(
        observation_dim,
        case.under(weights)["layers.0.weight"].shape[1] - observation_dim,
        settings["hidden"],
        settings["num_nets"],
        num_elites=1,
        weight_decay=[0.0] * layers,
        **bounds,
    )
    model.network.load_state_dict(case.under(weights))
    return model.to(case.device)


def read_sampler(meta: dict) -> dict[str, float]:
    names = ("num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise")
    return {name.lower(): meta[name] for name in names}


def replay(*draws: Tensor):
    """A noise source that hands out recorded numbers in the order in which they were drawn."""
    recorded = iter(draws)
    return lambda shape: next(recorded).reshape(shape)


def read_batch(case: Case, step: int | None = None) -> Transitions:
    fields = [case["batch/" + name] if step is None else case["batch/" + name][step] for name in FIELDS.values()]
    return split_rows(torch.cat(fields, dim=1), [field.shape[1] for field in fields])  # as they come from replay


def make_update(agent: TD3BC | DiffusionQL, mode: str) -> Callable[[Transitions, tuple], dict[str, Tensor]]:
    """`agent.update` in a mode of dydiff.updates."""
    if mode == "eager":
        return agent.update

    def replay_captured(*arguments) -> dict[str, Tensor]:
        work = partial(agent.apply_update, *arguments)
        before = copy.deepcopy(agent.state_dict())
        warm_up(work)
        agent.load_state_dict(before)
        return CapturedGraph(work, torch.Generator(agent.device)).replay()

    if mode == "compiled":
        trace_gradients()
    apply_update = compile_function(agent.apply_update) if mode == "compiled" else replay_captured

    def update(batch: Transitions, noise: tuple) -> dict[str, Tensor]:
        log = apply_update(batch, noise, agent.variant())
        agent.step += 1
        return log

    return update


def run_unet(case: Case, backend: str) -> dict[str, Pair]:
    return {"y": (read_denoiser(case).network(case["x"], case["noise_label"]), case["y"])}


def run_denoise(case: Case, backend: str) -> dict[str, Pair]:
    return {"y": (read_denoiser(case)(case["x"], case["sigma"]), case["y"])}


def run_edm_loss(case: Case, backend: str) -> dict[str, Pair]:
    flags = case.meta["use_cond"], case.meta["cond_on_action"]
    loss = edm_loss(read_denoiser(case), case["clean"], case["sigma"].flatten(), case["noise"], *flags)
    return {"loss": (loss, case["loss"]), "mean_loss": (loss.mean(), case["mean_loss"])}


def run_edm_sample(case: Case, backend: str) -> dict[str, Pair]:
    latents = case["latents"]
    condition = case.get("first_observation"), case.get("actions")
    draw = replay(latents, *case["churn_noise"])
    denoiser = prepare_denoiser(read_denoiser(case), backend)
    step = "reference" if backend == "reference" else "auto"
    sampled = sample_edm(denoiser, tuple(latents.shape), draw, *condition, **read_sampler(case.meta), backend=step)
    return {"y": (sampled, case["y"])}


def run_rollout(case: Case, backend: str) -> dict[str, Pair]:
    meta = case.meta
    action_dim = meta["data_dim"] - meta["observation_dim"]
    policy = TanhGaussianPolicy(meta["observation_dim"], action_dim, meta["policy_hidden"])
    policy.network.load_state_dict(case.under("w/policy/"))
    policy.to(case.device)
    dynamics = read_dynamics(case, meta["dynamics"], "w/dynamics/", {})
    dynamics.elites.fill_(meta["dynamics"]["elite"])
    limits, z_score = Limits(case["limits_min"], case["limits_max"]), ZScore(case["obs_mean"], case["obs_std"])
    spaces = Spaces(limits, z_score, -torch.ones(action_dim), torch.ones(action_dim))
    engine = RolloutEngine(
        [read_denoiser(case, "w/diffusion/")],
        dynamics,
        spaces.to(case.device),
        meta["horizon"],
        meta["iterative_times"],
        sampler=read_sampler(meta),
        backend=backend,
    )
    draws = [noise for latents, churn in zip(case["latents"], case["churn_noise"], strict=True) for noise in (latents, *churn)]
    generator = torch.Generator(case.device)
    trajectory = engine.roll_out(policy.mean_action, case["observation"], generator, replay(*draws))
    return {"y": (torch.cat(trajectory, dim=-1), case["y"])}


def run_dynamics(case: Case, backend: str) -> dict[str, Pair]:
    bounds = {key: case.meta[key] for key in ("activation", "max_log_var", "min_log_var")}
    model = read_dynamics(case, case.meta, "w/", bounds)
    observation, action = case["observation"], case["action"]
    change = case["next_observation"] - observation
    mean, log_var = model(observation, action)
    return {
        "mean": (mean, case["mean"]),
        "log_var": (log_var, case["log_var"]),
        "nll_per_net": (model.nll_per_network(observation, action, change), case["nll_per_net"]),
        "mse_per_net": (model.error_per_network(observation, action, change), case["mse_per_net"]),
        "total_loss": (model.loss(observation, action, change), case["total_loss"]),
    }


def load_critics(agent: TD3BC | DiffusionQL, case: Case) -> None:
    for critics in (agent.critics, agent.target_critics):
        for index in (0, 1):
            critics.load_member_state_dict(index, case.under(f"w0/qf{index + 1}/"))


def compare_weights(expected: dict[str, Tensor], ours: dict[str, Tensor], prefix: str) -> dict[str, Pair]:
    return {prefix + name: (ours[name], value) for name, value in expected.items()}


def compare_critics(agent: TD3BC | DiffusionQL, case: Case) -> dict[str, Pair]:
    pairs = {}
    for prefix, critics in (("qf", agent.critics), ("target_qf", agent.target_critics)):
        for index in (0, 1):
            name = f"{prefix}{index + 1}/"
            pairs |= compare_weights(case.under("w1/" + name), critics.member_state_dict(index), name)
    return pairs


def run_td3bc(case: Case, mode: str) -> dict[str, Pair]:
    meta = case.meta
    names = ("discount", "tau", "alpha", "policy_freq", "policy_lr", "qf_lr")
    settings = {name: meta[name] for name in names}
    agent = TD3BC(meta["observation_dim"], meta["action_dim"], meta["hidden"], **settings, device=case.device)
    for policy in (agent.policy, agent.target_policy):
        policy.network.load_state_dict(case.under("w0/policy/"))
    load_critics(agent, case)
    update, losses = make_update(agent, mode), []
    for step in range(meta["steps"]):
        batch = read_batch(case, step)
        noise = agent.draw_noise(len(batch.reward), torch.Generator().manual_seed(step))
        losses.append(agent.critic_loss(batch, noise)[0].detach())
        update(batch, noise)
    pairs = {"q_losses": (torch.stack(losses), case["q_losses"])} | compare_critics(agent, case)
    for prefix, policy in (("policy/", agent.policy), ("target_policy/", agent.target_policy)):
        pairs |= compare_weights(case.under("w1/" + prefix), policy.network.state_dict(), prefix)
    return pairs


def rename_actor(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names of the diffusion actor's layers to ours."""
    renamed = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{PUBLISHED_NAMES[layer]}.{kind}"] = value
    return renamed


def run_diffusion_actor(case: Case, backend: str) -> dict[str, Pair]:
    meta = case.meta
    dims = meta["observation_dim"], meta["action_dim"], meta["hidden"]
    actor = DiffusionActor(*dims, meta["n_timesteps"], meta["beta_schedule"])
    actor.load_state_dict(rename_actor(case.under("w/")))
    loss, reconstruction = actor.denoising_loss(case["clean_action"], case["state"], case["t"], case["eps"])
    return {
        "betas": (actor.betas, case["betas"]),
        "action": (actor.sample(case["state"], case["x_T"], case["noise"]), case["action"]),
        "bc_loss": (loss, case["bc_loss"]),
        "x_recon": (reconstruction, case["x_recon"]),
    }


def run_diffql(case: Case, mode: str) -> dict[str, Pair]:
    meta = case.meta
    names = ("discount", "tau", "eta", "lr", "grad_norm", "n_timesteps", "beta_schedule")
    settings = {name: meta[name] for name in names}
    agent = DiffusionQL(meta["observation_dim"], meta["action_dim"], meta["hidden"], **settings, device=case.device)
    for actor in (agent.actor, agent.ema_actor):
        actor.load_state_dict(rename_actor(case.under("w0/policy/")))
    load_critics(agent, case)
    batch = read_batch(case)
    numerator = torch.tensor([int(meta["numerator"] == "qf2")], device=case.device)
    noise = DiffusionQLNoise(case["next_x_T"], case["next_noise"], case["t"], case["eps"], numerator)
    critic_losses = agent.critic_loss(batch, noise)[0].detach()
    log = make_update(agent, mode)(batch, noise)
    losses = torch.stack([*critic_losses, log["cloning_loss"], log["policy_loss"]])
    pairs = {"losses": (losses, case["losses"])} | compare_critics(agent, case)
    for prefix, actor in (("policy/", agent.actor), ("ema/", agent.ema_actor)):
        pairs |= compare_weights(rename_actor(case.under("w1/" + prefix)), actor.state_dict(), prefix)
    return pairs


def run_hardmax(case: Case, backend: str) -> dict[str, Pair]:
    return {"keep": (hardmax_mask(case["returns"], case.meta["threshold"]), case["keep"])}


def run_softmax(case: Case, backend: str) -> dict[str, Pair]:
    probability = softmax_probability(case["returns"], case.meta["softmax_temp"])
    size = int(case.meta["threshold"] * len(probability))
    return {"probability": (probability, case["probability"]), "size": (torch.tensor(size), torch.tensor(case.meta["size"]))}


def run_transitions(case: Case, backend: str) -> dict[str, Pair]:
    meta = case.meta
    observation_dim, action_dim = meta["observation_dim"], meta["action_dim"]
    reward_model = RewardModel(observation_dim, action_dim, meta["reward_hidden"])
    reward_model.network.load_state_dict(case.under("w/reward/"))
    unused = Limits(torch.zeros(observation_dim + action_dim), torch.ones(observation_dim + action_dim))
    z_score = ZScore(case["obs_mean"], case["obs_std"])
    spaces = Spaces(unused, z_score, -torch.ones(action_dim), torch.ones(action_dim))
    trajectory = Trajectory(*case["trajectory"].split([observation_dim, action_dim], dim=-1))
    is_terminal = terminal_function(meta["environment"])
    transitions, mean_length = make_synthetic_transitions(trajectory, reward_model, is_terminal, spaces)
    pairs = {name: (getattr(transitions, field), case["out/" + name]) for field, name in FIELDS.items()}
    pairs["rewards"] = (transitions.reward[:, None], case["out/rewards"])
    pairs["terminals"] = (transitions.terminal.bool(), case["out/terminals"])
    return pairs | {"mean_rollout_length": (mean_length, torch.tensor(meta["mean_rollout_length"]))}


def read_dataset(case: Case, prefix: str):
    """The case's arrays as a dataset; windows cases have no rewards, which they do not need."""
    arrays = {name: value.numpy() for name, value in case.under(prefix).items()}
    arrays.setdefault("rewards", np.zeros(len(arrays["observations"]), np.float32))
    return dataset_from_arrays(arrays, "conformance")


def run_windows(case: Case, backend: str) -> dict[str, Pair]:
    dataset = read_dataset(case, "")
    limits = Limits.from_dataset(dataset)
    windows = Windows(dataset, case.meta["horizon"], limits)
    every = windows.gather(torch.arange(len(windows)))
    return {
        "windows": (every, case["windows"]),
        "first_observation": (every[:, 0, : dataset.observation_dim], case["first_observation"]),
        "limits_min": (limits.minimum, case["limits_min"]),
        "limits_max": (limits.maximum, case["limits_max"]),
    }


def run_limits(case: Case, backend: str) -> dict[str, Pair]:
    limits = Limits(case["limits_min"], case["limits_max"])
    return {
        "normalized": (limits.normalize(case["raw_in"]), case["normalized"]),
        "unnormalized": (limits.unnormalize(case["normalized_in"]), case["unnormalized"]),
    }


def run_qlearning(case: Case, backend: str) -> dict[str, Pair]:
    meta = case.meta
    transitions = make_transitions(read_dataset(case, "in/"), meta["terminate_on_end"], meta.get("max_episode_steps"))
    return {name: (torch.as_tensor(getattr(transitions, field)), case["out/" + name]) for field, name in FIELDS.items()}


# kind: (runner, limit on the relative error; 0 means exact)
KINDS = {
    "unet": (run_unet, 1e-4),
    "denoise": (run_denoise, 1e-4),
    "edm_loss": (run_edm_loss, 1e-4),
    "edm_sample": (run_edm_sample, 2e-3),
    "rollout": (run_rollout, 5e-3),
    "dynamics": (run_dynamics, 1e-4),
    "td3bc": (run_td3bc, 1e-4),
    "diffusion_actor": (run_diffusion_actor, 1e-4),
    "diffql": (run_diffql, 1e-4),
    "hardmax": (run_hardmax, 0.0),
    "softmax": (run_softmax, 1e-6),
    "transitions": (run_transitions, 1e-5),
    "windows": (run_windows, 1e-5),
    "limits": (run_limits, 1e-5),
    "qlearning": (run_qlearning, 0.0),
}


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """|ours - expected| / |expected| in the 2-norm; infinite where shapes differ, or where booleans do not agree exactly."""
    if ours.shape != expected.shape:
        return float("inf")
    if expected.dtype == torch.bool:
        return 0.0 if torch.equal(ours, expected) else float("inf")
    ours, expected = ours.detach().double(), expected.double()
    distance = (ours - expected.to(ours.device)).norm().item()
    norm = expected.norm().item()
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / norm


def run_file(
    path: Path, backends: list[str], device: str = "cpu", modes: Sequence[str] = ("eager",)
) -> Iterator[tuple[str, float, float, str]]:
    """Yield (kind, worst relative error, limit, backend, mode or "") of a case, once per backend or mode where it matters."""
    kind = Case(path).meta["kind"]
    ways = backends if kind in LIMITS_16_BIT else modes if kind in AGENT_KINDS else None
    case = Case(path, device if ways is not None else "cpu")
    if kind not in KINDS:
        yield kind, float("nan"), 0.0, "unknown kind"
        return
    runner, limit = KINDS[kind]
    for way in [""] if ways is None else ways:
        if way in IN_16_BIT:
            limit = LIMITS_16_BIT[kind]
        errors = [relative_error(*pair) for pair in runner(case, way).values()]
        yield kind, max(errors, key=lambda error: float("inf") if error != error else error), limit, way


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with .npz cases")
    parser.add_argument("--backend", choices=("all", *BACKENDS[1:]), default="reference", help="of sampler and rollout cases")
    parser.add_argument("--mode", choices=("all", *MODES[1:]), default="eager", help="of updates")
    parser.add_argument("--device", default="cpu", help="of sampler and rollout cases, and of updates")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.npz"))
    if not files:
        print(f"error: no .npz cases in '{options.folder}'", file=sys.stderr)
        return 1
    backends = [options.backend]
    if options.backend == "all":
        backends = [name for name in BACKENDS[1:] if is_available(name, options.device)]
    modes = [options.mode]
    if options.mode == "all":
        on_gpu = options.device.startswith("cuda")
        modes = ["eager", *["compiled"] * can_compile(torch.device(options.device)), *["graph"] * on_gpu]
    passed = failed = 0
    for path in files:
        for kind, error, limit, way in run_file(path, backends, options.device, modes):
            good = error <= limit  # NaN fails
            passed, failed = passed + good, failed + (not good)
            print(f"{path.name:36s}  {kind:15s}  {error:9.2e}  {limit:7.0e}  {'pass' if good else 'FAIL'}  {way}".rstrip())
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
