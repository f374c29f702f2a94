"""Train the behaviour policies that `dydiff collect` ships, with PPO of stable-baselines3, and choose among its snapshots.

    pip install stable-baselines3    # 2.9.2 trained those that ship
    python exp_specs/behaviour/train_behaviour.py train hopper
    python exp_specs/behaviour/train_behaviour.py ship hopper

`train` fills a folder with a snapshot every 10,000 steps. `ship` takes the one with the best training episodes as the expert, the
one nearest to a third of that as medium, and a few on the way there for medium-replay; it measures them, writes them into the
package, and their returns into `policies.md`, which also has the command that trained each.

Training episodes tell of a policy that was weaker than the snapshot's. What ships was therefore chosen by hand, going by measured
returns: medium earns 32 % of the expert's in hopper, 34 % in halfcheetah and 38 % in walker2d.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from dydiff.collecting.behaviour import SHIPPED, TanhGaussian, load_policy, save_policy
from dydiff.collecting.episodes import Work, record_episodes
from dydiff.environments import EnvironmentSpec, environment_spec, simulator_version

NUM_ENVIRONMENTS = 16
SNAPSHOT_STEPS = 10_000
REPLAYS = 4  # snapshots before medium
MEASURED_EPISODES = 50
MEASURING_SEED = (99, 0)  # of other episodes than those that a choice went by
TABLE = Path(__file__).with_name("policies.md")
TABLE_HEAD = """# The shipped behaviour policies

`dydiff collect` makes its locomotion datasets with them. Written by `train_behaviour.py ship`; returns are mean ± sd over episodes
with drawn actions.

| policy | training steps | return | episode length | episodes | simulator | trained by |
| --- | --- | --- | --- | --- | --- | --- |"""


class TanhActions(gymnasium.ActionWrapper):
    """Squashes what the policy draws: a Gaussian for PPO is a tanh-Gaussian for the environment, with a proper density."""

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.tanh(action)


class Snapshots(BaseCallback):
    """Saves the policy as it is every SNAPSHOT_STEPS, with what its last training episodes earned."""

    def __init__(self, folder: Path, facts: dict[str, str | int]):
        super().__init__()
        self.folder, self.facts, self.due = folder, facts, SNAPSHOT_STEPS

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.due and self.model.ep_info_buffer:
            self._on_training_end()
            self.due += SNAPSHOT_STEPS

    def _on_training_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        earned = {"training_return": round(float(np.mean(returns)), 1), "training_episodes": len(returns)}
        facts = {**self.facts, "steps": self.num_timesteps, **earned}
        save_policy(self.folder / f"{self.num_timesteps:08d}.safetensors", read_weights(self.model), facts)
        print(f"{self.num_timesteps:9d} steps: {earned['training_return']:8.1f}", flush=True)


def read_weights(model: PPO) -> dict[str, np.ndarray]:
    """The policy's network under `dydiff.collecting.behaviour`'s names, with the observations' normalisation folded into it."""
    first, second = (model.policy.mlp_extractor.policy_net[index] for index in (0, 2))
    layers = {"fc0": first, "fc1": second, "last_fc": model.policy.action_net}
    weights = {}
    for name, layer in layers.items():
        weights[f"{name}/weight"] = layer.weight.detach().double().numpy()
        weights[f"{name}/bias"] = layer.bias.detach().double().numpy()
    normaliser = model.get_vec_normalize_env()
    weights["fc0/weight"] = weights["fc0/weight"] / np.sqrt(normaliser.obs_rms.var + normaliser.epsilon)
    weights["fc0/bias"] = weights["fc0/bias"] - weights["fc0/weight"] @ normaliser.obs_rms.mean
    weights["last_fc_log_std/weight"] = np.zeros_like(weights["last_fc/weight"])
    weights["last_fc_log_std/bias"] = model.policy.log_std.detach().double().numpy()
    return weights


def make_environment(spec: EnvironmentSpec) -> gymnasium.Env:
    """One training environment; the bounds keep stable-baselines3 from clipping what tanh squashes anyway."""
    environment = TanhActions(Monitor(spec.make()))
    environment.action_space = gymnasium.spaces.Box(-1e6, 1e6, (spec.action_dim,), np.float32)
    return environment


def train(name: str, steps: int, batch: int, gamma: float, gae_lambda: float, log_std: float, seed: int, folder: Path) -> None:
    """Train for `steps` environment steps and leave the snapshots in `folder`."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    spec = environment_spec(name)
    environments = DummyVecEnv([lambda: make_environment(spec)] * NUM_ENVIRONMENTS)
    # Observations beyond this never come, so that the normalisation is linear and can be folded into the network.
    environments = VecNormalize(environments, gamma=gamma, clip_obs=100.0)
    model = PPO(
        "MlpPolicy",
        environments,
        learning_rate=lambda remaining: 3e-4 * remaining,
        n_steps=128,
        batch_size=batch,
        n_epochs=10,
        gamma=gamma,
        gae_lambda=gae_lambda,
        clip_range=0.2,
        policy_kwargs={
            "net_arch": {"pi": [64, 64], "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
            "log_std_init": log_std,
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},
        },
        seed=seed,
        device="cpu",
    )
    facts = {
        "environment": name,
        "backend": spec.backend,
        "mujoco_version": simulator_version(),
        "command": f"python exp_specs/behaviour/train_behaviour.py train {name} --steps {steps} --batch {batch} --gamma {gamma} "
        f"--gae_lambda {gae_lambda} --log_std {log_std} --seed {seed}",
    }
    model.learn(steps, callback=Snapshots(folder, facts))


def ship(name: str, folder: Path, medium: int | None, expert: int | None, expert_folder: Path) -> None:
    """Choose among the snapshots of a training, measure the chosen ones and write them into the package."""
    snapshots, experts = ([load_policy(path) for path in sorted(place.glob("*.safetensors"))] for place in (folder, expert_folder))
    best = max(experts, key=training_return) if expert is None else nearest(experts, training_steps, expert)
    if medium is None:
        middle = nearest(snapshots, training_return, training_return(best) / 3)
    else:
        middle = nearest(snapshots, training_steps, medium)
    before = [snapshot for snapshot in snapshots if training_steps(snapshot) < training_steps(middle)]
    spread = np.linspace(0, len(before), min(REPLAYS, len(before)), endpoint=False).astype(int)
    chosen = {"medium": middle, "expert": best} | {f"replay-{number}": before[index] for number, index in enumerate(spread)}
    SHIPPED.mkdir(exist_ok=True)
    for path in SHIPPED.glob(f"{name}-*.safetensors"):
        path.unlink()
    for role, policy in sorted(chosen.items()):
        facts = {"name": f"{name}-{role}", **policy.facts, **measure(policy)}
        path = SHIPPED / f"{name}-{role}.safetensors"
        save_policy(path, policy.weights, facts)
        path.chmod(0o644)  # safetensors leaves files that only their owner may read
    TABLE.write_text("\n".join([TABLE_HEAD, *(describe(path) for path in sorted(SHIPPED.iterdir()))]) + "\n")
    print(TABLE.read_text())


def training_steps(policy: TanhGaussian) -> int:
    return policy.facts["steps"]


def training_return(policy: TanhGaussian) -> float:
    return policy.facts["training_return"]


def nearest(policies: list[TanhGaussian], key: Callable[[TanhGaussian], float], value: float) -> TanhGaussian:
    return min(policies, key=lambda policy: abs(key(policy) - value))


def describe(path: Path) -> str:
    """A shipped policy's row of the table."""
    facts = load_policy(path).facts
    earned = f"{facts['return_mean']:.0f} ± {facts['return_sd']:.0f}"
    figures = f"{facts['steps']:,} | {earned} | {facts['length_mean']:.0f} | {facts['measured_episodes']}"
    return f"| {facts['name']} | {figures} | {facts['measured_on']} | `{facts['command']}` |"


def measure(policy: TanhGaussian) -> dict[str, float]:
    """What episodes of the policy earn, with its actions drawn as `dydiff collect` draws them."""
    spec = environment_spec(policy.facts["environment"])
    rows = record_episodes(Work(spec, policy, MEASURING_SEED, range(MEASURED_EPISODES)))
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1
    returns = np.array([part.sum() for part in np.split(rows["rewards"].astype(np.float64), ends[:-1])])
    return {
        "return_mean": round(returns.mean(), 1),
        "return_sd": round(returns.std(), 1),
        "length_mean": round(len(rows["rewards"]) / len(returns), 1),
        "measured_episodes": len(returns),
        "measured_on": f"{spec.backend}, MuJoCo {simulator_version()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "ship"])
    parser.add_argument("environment", choices=["hopper", "halfcheetah", "walker2d"])
    parser.add_argument("--steps", type=int, default=3_000_000, help="of training")
    parser.add_argument("--batch", type=int, default=64, help="of training")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount in training")
    parser.add_argument("--gae_lambda", type=float, default=0.95, help="of training's advantages")
    parser.add_argument("--log_std", type=float, default=-0.7, help="log of the standard deviation that training begins with")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--medium", type=int, default=None, help="the training steps of the medium policy, to choose it by hand")
    parser.add_argument("--expert", type=int, default=None, help="the training steps of the expert, to choose it by hand")
    parser.add_argument("--folder", type=Path, default=None, help="of the snapshots")
    parser.add_argument("--expert_folder", type=Path, default=None, help="of the snapshots to choose the expert from, if others")
    options = parser.parse_args()
    folder = options.folder or Path("training-runs", f"behaviour-{options.environment}")
    if options.stage == "train":
        learning = options.batch, options.gamma, options.gae_lambda, options.log_std
        train(options.environment, options.steps, *learning, options.seed, folder)
    else:
        ship(options.environment, folder, options.medium, options.expert, options.expert_folder or folder)


if __name__ == "__main__":
    main()
