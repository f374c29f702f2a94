"""The kinds of recorded cases: what dydiff computes for each, beside what the published implementation computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from conformance_case import (
    FIELDS,
    Case,
    read_batch,
    read_dataset,
    read_denoiser,
    read_dynamics,
    read_sampler,
    rename_actor,
    replay,
)
from torch import Tensor

from dydiff.agents.diffusion_actor import DiffusionActor
from dydiff.agents.diffusion_ql import DiffusionQL, DiffusionQLNoise
from dydiff.agents.td3_bc import TD3BC
from dydiff.backends.choice import prepare_denoiser
from dydiff.capture import CapturedGraph, warm_up
from dydiff.data import Limits, Spaces, Transitions, Windows, ZScore, make_transitions
from dydiff.device import fast_float32, sum_in_float32
from dydiff.diffusion.edm import edm_loss
from dydiff.diffusion.sampler import sample_edm
from dydiff.environments.terminal import terminal_function
from dydiff.filters import hardmax_mask, softmax_probability
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.replay import ReplayBuffer
from dydiff.reward import RewardModel
from dydiff.rollout import RolloutEngine, Trajectory, make_synthetic_transitions
from dydiff.updates import Updates

Pair = tuple[Tensor, Tensor]  # ours, expected


def make_update(agent: TD3BC | DiffusionQL, batch: Transitions, mode: str) -> Callable[[Transitions, tuple], dict[str, Tensor]]:
    """`agent.update` in a mode of dydiff.updates, for batches like this one."""
    if mode == "eager":
        return agent.update
    buffer = ReplayBuffer.from_transitions(batch, len(batch.reward))
    updates = Updates(agent, buffer, buffer, buffer.size, 1.0, torch.Generator(agent.device), mode, 0)

    def apply_update(batch: Transitions, noise: tuple) -> dict[str, Tensor]:
        rows = torch.cat([field.view(buffer.size, -1) for field in batch], dim=1)
        with fast_float32(agent.device), sum_in_float32():
            sums, _ = updates._apply((agent.variant(),), [(rows, noise)])
        return sums

    def replay_captured(*arguments) -> dict[str, Tensor]:
        work = partial(apply_update, *arguments)
        before = copy.deepcopy(agent.state_dict())
        warm_up(work, agent.device)
        agent.load_state_dict(before)
        return CapturedGraph(work, agent.device, torch.Generator(agent.device)).replay()

    def update(batch: Transitions, noise: tuple) -> dict[str, Tensor]:
        log = (replay_captured if mode == "graph" else apply_update)(batch, noise)
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
    settings = {key: case.meta[key] for key in ("max_log_var", "min_log_var")}
    settings["activation"] = getattr(F, case.meta["activation"])
    model = read_dynamics(case, case.meta, "w/", settings)
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
    update, losses = make_update(agent, read_batch(case, 0), mode), []
    for step in range(meta["steps"]):
        batch = read_batch(case, step)
        noise = agent.draw_noise(len(batch.reward), torch.Generator().manual_seed(step))
        losses.append(agent.critic_loss(batch, noise)[0].detach())
        update(batch, noise)
    pairs = {"q_losses": (torch.stack(losses), case["q_losses"])} | compare_critics(agent, case)
    for prefix, policy in (("policy/", agent.policy), ("target_policy/", agent.target_policy)):
        pairs |= compare_weights(case.under("w1/" + prefix), policy.network.state_dict(), prefix)
    return pairs


def run_diffusion_actor(case: Case, backend: str) -> dict[str, Pair]:
    meta = case.meta
    dims = meta["observation_dim"], meta["action_dim"], meta["hidden"]
    actor = DiffusionActor(*dims, meta["n_timesteps"], meta["beta_schedule"], embedding_dim=meta.get("t_dim", 16))
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
    weights = rename_actor(case.under("w0/policy/"))
    widths = meta["hidden"], len(weights["network.layers.0.bias"])  # of the critics, of the actor
    agent = DiffusionQL(meta["observation_dim"], meta["action_dim"], *widths, **settings, device=case.device)
    for actor in (agent.actor, agent.ema_actor):
        actor.load_state_dict(weights)
    load_critics(agent, case)
    batch = read_batch(case)
    numerator = torch.tensor([int(meta["numerator"] == "qf2")], device=case.device)
    noise = DiffusionQLNoise(case["next_x_T"], case["next_noise"], case["t"], case["eps"], numerator)
    critic_losses = agent.critic_loss(batch, noise)[0].detach()
    log = make_update(agent, batch, mode)(batch, noise)
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
