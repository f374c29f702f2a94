"""A published policy snapshot (whole modules) as a policy checkpoint of TD3+BC or Diffusion-QL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dydiff.agents import TD3BC, DiffusionQL
from dydiff.agents.diffusion_actor import PUBLISHED_NAMES, DiffusionActor, make_betas
from dydiff.data import Spaces
from dydiff.errors import DydiffError
from dydiff.importing.product import Product, check_weights, load_strictly, name_layers, note_unused, read_layers
from dydiff.importing.records import is_module, named_tensors
from dydiff.models import POLICY, store_spaces

# Under which names a snapshot may hold its networks.
ACTORS = ("policy", "actor")
TARGET_ACTORS = ("target_policy", "ema", "ema_policy", "ema_model", "target_actor")
CRITICS = (("qf1", "qf2"), ("q1", "q2"))
NETWORKS = (*ACTORS, *TARGET_ACTORS, *(prefix + name for pair in CRITICS for name in pair for prefix in ("", "target_")))
SCHEDULES = ("vp", "linear", "cosine")


def is_policy(tree: Any) -> bool:
    """Whether this is a module, or a dict with modules in it."""
    return is_module(tree) or (isinstance(tree, dict) and any(is_module(value) for value in tree.values()))


def convert_policy(tree: Any, spaces: Spaces, environment: str) -> Product:
    """Convert a policy and, where they are there, critics and target networks; optimizers start anew.

    Raises:
        DydiffError: no known kind of policy, or one that does not fit the environment.
    """
    parts = {ACTORS[0]: tree} if is_module(tree) else tree
    networks = {name: named_tensors(parts[name]) for name in NETWORKS if name in parts}
    actor = _pick(networks, ACTORS)
    if actor is None:
        raise DydiffError(f"The snapshot holds no policy: none of its parts {list(parts)[:8]} is named {' or '.join(ACTORS)}.")
    is_diffusion = any(name.endswith(f"{layer}.weight") for name in actor for layer in PUBLISHED_NAMES)
    build = _build_diffusion_ql if is_diffusion else _build_td3_bc
    notes = ["The file does not say which data it was trained on; its observations are scaled as those of --dataset."]
    agent, model, used = build(networks, actor, spaces, notes)
    note_unused(notes, map(str, parts), used)
    algorithm = "diffusion_ql" if is_diffusion else "td3_bc"
    notes.append(f"The algorithm is taken to be {algorithm}, by the form of its policy.")
    manifest = {"algorithm": algorithm, "model": model, "environment": environment, "epoch": 0}
    return Product(POLICY, {"agent": agent.state_dict(), "spaces": store_spaces(spaces)}, manifest, notes)


Networks = dict[str, dict[str, Tensor]]
Built = tuple[TD3BC | DiffusionQL, dict[str, Any], list[str]]


def _pick(networks: Networks, names: tuple[str, ...]) -> dict[str, Tensor] | None:
    return next((networks[name] for name in names if networks.get(name)), None)


def _build_td3_bc(networks: Networks, actor: dict[str, Tensor], spaces: Spaces, notes: list[str]) -> Built:
    weights, hidden_dims = _read_gaussian(actor, spaces)
    critics, critic_hidden = _read_critics(networks, spaces)
    if critics and critic_hidden != hidden_dims:
        raise DydiffError(f"The snapshot's policy has hidden widths {hidden_dims}, its critics {critic_hidden}: not TD3+BC's.")
    model = {"observation_dim": spaces.observation_dim, "action_dim": spaces.action_dim, "hidden_dims": hidden_dims}
    agent = TD3BC(**model, generator=torch.Generator().manual_seed(0))
    target = _pick(networks, TARGET_ACTORS)
    load_strictly(agent.policy.network, weights, "tanh-Gaussian policy")
    target_weights = _read_gaussian(target, spaces)[0] if target else weights
    load_strictly(agent.target_policy.network, target_weights, "tanh-Gaussian policy")
    if not critics:
        notes.append("The snapshot holds no critics; new ones are random, good for acting but not for further training.")
    used = _load_critics(agent, critics)
    return agent, model, [*ACTORS, *TARGET_ACTORS, *used]


def _build_diffusion_ql(networks: Networks, actor: dict[str, Tensor], spaces: Spaces, notes: list[str]) -> Built:
    weights, n_timesteps, schedule = _read_diffusion_actor(actor)
    critics, critic_hidden = _read_critics(networks, spaces)
    if not critics:
        raise DydiffError("The snapshot holds no critics (qf1 and qf2), by which Diffusion-QL chooses among its actions.")
    model = {
        "observation_dim": spaces.observation_dim,
        "action_dim": spaces.action_dim,
        "hidden_dims": critic_hidden,
        "actor_hidden_dim": len(weights["network.layers.0.bias"]),
        "n_timesteps": n_timesteps,
        "beta_schedule": schedule,
    }
    dims = spaces.observation_dim, spaces.action_dim, model["actor_hidden_dim"]
    with torch.device("meta"):  # the file decides the sizes: compare before memory is reserved for them
        load_strictly(DiffusionActor(*dims, n_timesteps, schedule), weights, "diffusion actor")
    agent = DiffusionQL(**model, generator=torch.Generator().manual_seed(0))
    load_strictly(agent.actor, weights, "diffusion actor")
    average = _pick(networks, TARGET_ACTORS)
    if average is None:
        notes.append("The snapshot holds no moving average of the actor; it starts from the actor.")
    load_strictly(agent.ema_actor, _read_diffusion_actor(average)[0] if average else weights, "diffusion actor")
    used = _load_critics(agent, critics)
    return agent, model, [*ACTORS, *TARGET_ACTORS, *used]


def _read_gaussian(tensors: dict[str, Tensor], spaces: Spaces) -> tuple[dict[str, Tensor], list[int]]:
    """Weights and hidden widths of a tanh-Gaussian policy, whose means and log-stds come from one last layer or from two."""
    heads = [name for name, tensor in tensors.items() if name.endswith("weight") and len(tensor) == spaces.action_dim]
    spread = [name for name in heads if "std" in name]
    if len(spread) == 1:
        (spread_name,) = spread
        tensors, spread_head = dict(tensors), {}
        for kind in ("weight", "bias"):
            spread_head[kind] = tensors.pop(f"{spread_name.removesuffix('weight')}{kind}")
        layers = list(read_layers(tensors, spaces.observation_dim, "policy").values())
        weight, bias = layers[-1]
        layers[-1] = torch.cat([weight, spread_head["weight"]]), torch.cat([bias, spread_head["bias"]])
    else:
        layers = list(read_layers(tensors, spaces.observation_dim, "policy").values())
    return name_layers(layers), [len(bias) for _, bias in layers[:-1]]


def _read_critics(networks: Networks, spaces: Spaces) -> tuple[dict[str, dict[str, Tensor]], list[int]]:
    """Both critics, their targets where they are there, and their hidden widths; nothing if one is missing."""
    for pair in CRITICS:
        if all(networks.get(name) for name in pair):
            names = [*pair, *(f"target_{name}" for name in pair if networks.get(f"target_{name}"))]
            width = spaces.observation_dim + spaces.action_dim
            layers = {name: list(read_layers(networks[name], width, "critic").values()) for name in names}
            hidden = [len(bias) for _, bias in layers[pair[0]][:-1]]
            return {name: name_layers(each) for name, each in layers.items()}, hidden
    return {}, []


def _load_critics(agent: TD3BC | DiffusionQL, critics: dict[str, dict[str, Tensor]]) -> list[str]:
    """Load critics and targets (without targets in the file, the critics); returns the names of what was used."""
    for index, name in enumerate([name for name in critics if not name.startswith("target_")]):
        for ensemble, weights in ((agent.critics, critics[name]), (agent.target_critics, critics.get(f"target_{name}"))):
            member = ensemble.member_state_dict(index)
            weights = critics[name] if weights is None else weights
            if {key: value.shape for key, value in member.items()} != {key: value.shape for key, value in weights.items()}:
                raise DydiffError(f"The snapshot's critic '{name}' has other layers than the first one.")
            ensemble.load_member_state_dict(index, weights)
    return list(critics)


def _read_diffusion_actor(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int, str]:
    """Weights of a diffusion actor, its number of steps and its schedule, told by the betas that it stores."""
    weights = {}
    for layer, ours in PUBLISHED_NAMES.items():
        for kind in ("weight", "bias"):
            matches = [value for name, value in tensors.items() if f".{name}".endswith(f".{layer}.{kind}")]
            if len(matches) != 1:
                raise DydiffError(f"The snapshot's diffusion actor has {len(matches)} layers named '{layer}', not one.")
            weights[f"{ours}.{kind}"] = matches[0]
    betas = next((value for name, value in tensors.items() if f".{name}".endswith(".betas")), None)
    if betas is None or betas.dim() != 1 or not 1 <= len(betas) <= 1000:
        raise DydiffError("The snapshot's diffusion actor does not hold its noise schedule ('betas').")
    for schedule in SCHEDULES:
        if torch.allclose(betas.double(), make_betas(schedule, len(betas)), rtol=1e-4, atol=1e-6):
            return check_weights(weights), len(betas), schedule
    raise DydiffError(f"The snapshot's noise schedule of {len(betas)} steps is none of {', '.join(SCHEDULES)}.")
