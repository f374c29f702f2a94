"""What would DyDiff gain with perfect dynamics? Finished runs trained again with the simulator in the place of all learnt dynamics.

    python benchmarks/perfect_dynamics.py training-runs/00006-dydiff-s0 training-runs/00007-dydiff-s1 --json perfect.json

Same settings, seeds, start states, reward model, filter and terminal function as each run; only its rollouts are now what the
policy does in the simulator from the same starts. What such a training earns is the ceiling of any dynamics model under these
settings: where it is no better than the base algorithm, the rollouts' errors are not what is missing. `--true-reward` also replaces
the reward model, in the filter and in the transitions. To see what else costs returns, vary one thing at a time: `--set` changes
any setting (`rl_trainer_params.keep_condition.threshold=1` keeps every rollout), and `--clone-real` lets TD3+BC clone the data's
actions alone, not the policy's own earlier ones. One run's settings serve any number of `--seeds`; it may have been stopped before
its first evaluation.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import documented_parser, output_file, several, tells_errors
from machine import describe_machine
from torch import Tensor

from dydiff.agents import AGENTS
from dydiff.agents.td3_bc import TD3BC, TD3BCNoise
from dydiff.checkpoint import write_atomically
from dydiff.config import Constants
from dydiff.data import Transitions
from dydiff.environments.simulate import roll_out_simulator, state_from_observation
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import Variant, override
from dydiff.experiments.policy_stage import build_policies, find_models
from dydiff.experiments.settings import from_mapping
from dydiff.models import in_raw_space
from dydiff.options import seed as parse_seed
from dydiff.problem import Problem, load_problem
from dydiff.progress import Progress
from dydiff.reports.tables import format_table, plus_minus
from dydiff.reports.uncertainty import mean_with_error
from dydiff.rollout import Actor, Trajectory
from dydiff.runs import read_log, read_settings


class Simulator:
    """Stands where a `RolloutEngine` stands, and after a rollout where the reward model stands."""

    def __init__(self, problem: Problem, horizon: int):
        self.problem = problem
        self.horizon = horizon
        self._rewards: dict[bytes, float] = {}

    def roll_out(self, policy: Actor, start: Tensor, generator: torch.Generator) -> Trajectory:
        """As `RolloutEngine.roll_out`: start [B, O] -> H rows each, in policy space."""
        spaces, spec = self.problem.spaces, self.problem.spec
        states = state_from_observation(spec, spaces.observation_policy_to_raw(start).numpy())
        truth = roll_out_simulator(spec, *states, self.horizon, in_raw_space(partial(policy.act, generator=generator), spaces))
        observation = spaces.observation_raw_to_policy(torch.as_tensor(truth.observation))
        rows = observation.flatten(0, 1).numpy()
        self._rewards = {row.tobytes(): float(reward) for row, reward in zip(rows, truth.reward.flat, strict=True)}
        return Trajectory(observation, spaces.action_raw_to_policy(torch.as_tensor(truth.action)))

    def reward(self, observation: Tensor, action: Tensor) -> Tensor:
        """What the simulator gave in rows of the last rollout: observation [..., O] -> [...]."""
        rows = observation.flatten(0, -2).numpy()
        return torch.tensor([self._rewards[row.tobytes()] for row in rows]).view(observation.shape[:-1])


def clone_real_actions(agent: TD3BC, num_real: int) -> None:
    """Let the cloning term of an agent heed the first `num_real` transitions of a batch, the real ones, and no other."""
    whole = agent.policy_loss

    def policy_loss(batch: Transitions, noise: TD3BCNoise) -> tuple[Tensor, Tensor]:
        loss, cloning = whole(batch, noise)
        _, real = whole(Transitions(*(field[:num_real] for field in batch)), TD3BCNoise(*(field[:num_real] for field in noise)))
        return loss - cloning + real, real

    agent.policy_loss = policy_loss


def read_variant(run: Path, seed: int | None, clone_real: bool, changes: Sequence[str]) -> Variant:
    """What a DyDiff run was trained with, changed as asked; `seed` is None for the run's own.

    Raises:
        DydiffError: no run with rollouts is there, there is no such setting, or `clone_real` is asked of another algorithm.
    """
    settings = read_settings(run)
    if settings is None or settings.get("stage") not in AGENTS:
        raise DydiffError(f"'{run}' is no run of a policy. Name run folders of policies that were trained with DyDiff.")
    override(settings["constants"], [*changes, *([] if seed is None else [f"seed={seed}"])])
    constants = from_mapping(Constants, settings["constants"], f"{run / 'settings.yaml'}: constants")
    if constants.rl_trainer_params.real_ratio >= 1:
        raise DydiffError(f"'{run}' was trained without DyDiff: it has no rollouts to replace. Name runs with it.")
    if clone_real and AGENTS[settings["stage"]] is not TD3BC:
        raise DydiffError(f"--clone-real is about TD3+BC's cloning term; '{run}' has none.")
    return Variant(settings["stage"], constants, {}, 0)


def train(
    run: Path, variant: Variant, true_reward: bool, clone_real: bool, say: Callable[[str], None]
) -> tuple[list[int], list[float]]:
    """Repeat a DyDiff run with the simulator's rollouts; epochs and returns of its evaluations.

    Raises:
        DydiffError: the run's data or models are gone.
    """
    constants = variant.constants
    problem = load_problem(constants.dataset_name, constants.env_specs.env_name, constants.env_specs.backend)
    with Progress(run.name) as progress:
        models = find_models(constants, problem, run.parent)
        (trainer,) = build_policies([variant], problem, "cpu", models, progress)
    simulator = Simulator(problem, trainer.rollouts.engine.horizon)
    # Both replace an object in place: the trainer's judge has its rollouts already.
    trainer.rollouts.engine = simulator
    if true_reward:
        trainer.rollouts.reward_model = simulator.reward
    if clone_real:
        params = constants.rl_trainer_params
        clone_real_actions(trainer.agent, int(params.batch_size * params.real_ratio))
    epochs, returns = [], []
    while not trainer.finished:
        record = trainer.run_epoch()
        for epoch, complete in [(trainer.epoch, record)] if record is not None else trainer.late_records(wait=True):
            if "evaluation/return" in complete:
                epochs.append(epoch)
                returns.append(complete["evaluation/return"])
                say(f"{run.name}, seed {constants.seed}, epoch {epoch}: {returns[-1]:.1f}")
    return epochs, returns


def describe(name: str, curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard error over the curves of the last return, of the mean of the last five, and of the best."""
    figures = {"last": lambda curve: curve[-1], "late": lambda curve: np.mean(curve[-5:]), "best": max}
    means = {name: mean_with_error(np.array([choose(curve) for curve in curves])) for name, choose in figures.items()}
    return {"rollouts": name, **means, "curves": list(map(list, curves))}


def show(line: dict[str, Any]) -> list[str]:
    figures = (line[which] for which in ("last", "late", "best"))
    return [line["rollouts"], *(plus_minus(figure["mean"], figure["standard_error"], 1) for figure in figures)]


@tells_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders of policies trained with DyDiff")
    parser.add_argument("--seeds", type=several(parse_seed), default=[None], metavar="N,N", help="instead of each run's own seed")
    parser.add_argument("--true-reward", action="store_true", help="take rewards from the simulator too")
    parser.add_argument("--clone-real", action="store_true", help="TD3+BC: clone the data's actions alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of the runs; repeatable")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all numbers, anew after every training")
    options = parser.parse_args(arguments)
    if len({run.resolve() for run in options.runs}) < len(options.runs):
        parser.error("argument RUN: a run is named twice")
    # All of them first: what is wrong with the last is told before the first trains for hours.
    variants = [
        (run, read_variant(run, seed, options.clone_real, options.set))
        for run, seed in itertools.product(options.runs, options.seeds)
    ]
    recorded = [[line["evaluation/return"] for line in read_log(run) if "evaluation/return" in line] for run in options.runs]
    name = ", ".join(
        ["simulator", *["with its rewards"] * options.true_reward, *["data's actions cloned"] * options.clone_real, *options.set]
    )
    lines = [describe("as recorded", recorded)] if all(recorded) else []
    about = {"runs": [run.name for run in options.runs], "seeds": options.seeds, "machine": describe_machine("cpu")}
    curves = []
    for run, variant in variants:
        epochs, returns = train(run, variant, options.true_reward, options.clone_real, partial(print, flush=True))
        curves.append(returns)
        if options.json:
            text = json.dumps(about | {"epochs": epochs, "lines": [*lines, describe(name, curves)]}, indent=1) + "\n"
            write_atomically(options.json, lambda path, text=text: path.write_text(text))
    rows = map(show, [*lines, describe(name, curves)])
    print(format_table([["rollouts", "last return", "mean of the last five", "best return"], *rows]))


if __name__ == "__main__":
    sys.exit(main())
