"""Does the speed cost learning? Learning curves of dydiff's trainer and of the plain published-style one, on the same task.

    python benchmarks/learning_curves.py --dataset maze2d-umaze-local --seeds 0,1,2
    python benchmarks/learning_curves.py --dataset maze2d-umaze-local --seeds 0,1,2,3,4 --epochs 20 --json curves.jsonl
    python benchmarks/learning_curves.py --dataset hopper-medium-replay-local --agent diffusion_ql --variants ours,bf16

An agent on the real transitions of a dataset, with the published settings. `published` (TD3+BC only) is
benchmarks/update_baselines.py: a module and an optimizer per network, replay in numpy, one seed after the other. `ours` is the
trainer that `dydiff run` uses, with all seeds together (`seeds` in an experiment file) and the update mode of --mode; `bf16` is the
same with `update_precision: bf16`. All are evaluated alike after every epoch. `published` shares nothing random with the others but
the seeds of the episodes, so they can agree within seed noise only; `ours` and `bf16` draw the same, but small differences grow.

The table shows mean returns over the seeds with their standard errors; the last lines compare the means over the second half of
training with the first variant's, with a 95 % bootstrap interval of the difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from command_line import documented_parser, one_of, output_file, several, some_of, tells_errors
from harness import append_lines
from machine import describe_machine
from update_baselines import TD3BC, Replay, sample_published

from dydiff.agents import AGENTS
from dydiff.device import find_device
from dydiff.errors import DydiffError
from dydiff.evaluate import Evaluator, episode_seed
from dydiff.evaluation_worker import PolicyEvaluator, describe_evaluation
from dydiff.experiments.seeds import SeedTrainers
from dydiff.models import in_raw_space
from dydiff.options import positive
from dydiff.options import seed as parse_seed
from dydiff.problem import Problem, load_problem
from dydiff.replay import ReplayBuffer
from dydiff.reports.tables import format_table, plus_minus
from dydiff.reports.uncertainty import bootstrap_difference, standard_error
from dydiff.trainer import Evaluation, PolicyTrainer, Saving
from dydiff.updates import MODES, choose_mode

BATCH, LONGEST = 256, 1000


def train_published(problem: Problem, options: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Returns [seeds, epochs], and the seconds that a seed's updates took."""
    transitions = problem.policy_transitions("cpu")
    sizes = problem.dataset.observation_dim, problem.dataset.action_dim
    real = Replay(len(transitions.reward), *sizes, options.device)
    for stored, field in zip(real.fields, transitions, strict=True):
        stored[:] = field.numpy().reshape(real.capacity, -1)
    real.size = real.capacity
    evaluator = Evaluator(problem.spec, options.steps, LONGEST)
    spaces = problem.spaces.to(options.device)
    curves, seconds = [], 0.0
    for seed in options.seeds:
        torch.manual_seed(seed)
        np.random.seed(seed)
        agent = TD3BC(*sizes, tuned=False, device=options.device)
        act = in_raw_space(agent.mean_action, spaces)
        curve = []
        for epoch in range(options.epochs):
            began = time.perf_counter()
            for _ in range(options.updates):
                agent.update(sample_published(real, real, BATCH, BATCH))
            seconds += time.perf_counter() - began
            curve.append(evaluator.evaluate(act, episode_seed(seed, epoch + 1)).mean_return)
        curves.append(curve)
    return np.array(curves), seconds / len(options.seeds)


def train_ours(precision: str, problem: Problem, options: argparse.Namespace) -> tuple[np.ndarray, float]:
    """The same by dydiff's trainer, with products of a precision."""
    sizes = {"observation_dim": problem.dataset.observation_dim, "action_dim": problem.dataset.action_dim}
    spaces = problem.spaces.to(options.device)
    where = problem.spec, options.steps, LONGEST, None, options.device
    evaluator = PolicyEvaluator(describe_evaluation(options.agent, sizes, spaces, *where))
    transitions = problem.policy_transitions(options.device)
    real = ReplayBuffer.from_transitions(transitions, len(transitions.reward))

    def build(seed: int) -> PolicyTrainer:
        return PolicyTrainer(
            AGENTS[options.agent](**sizes, device=options.device, generator=torch.Generator().manual_seed(seed)),
            spaces,
            real,
            ReplayBuffer(1, *sizes.values(), options.device),
            None,
            Evaluation(evaluator, problem.dataset.name, seed, every=1),
            Saving(1, False, False, False, {}),
            num_epochs=options.epochs,
            updates_per_epoch=options.updates,
            batch_size=BATCH,
            real_ratio=1.0,
            seed=seed,
            update_mode=options.mode,
            update_precision=precision,
        )

    stage = SeedTrainers([build(seed) for seed in options.seeds])
    curves = np.zeros((len(options.seeds), options.epochs))
    seconds = 0.0
    while not stage.finished:
        stage.run_epoch()
        for epoch, record in stage.late_records(wait=True):
            curves[record.index, epoch - 1] = record["evaluation/return"]
            seconds += record["time/updates"]
    return curves, seconds / len(options.seeds)


VARIANTS: dict[str, Callable[[Problem, argparse.Namespace], tuple[np.ndarray, float]]] = {
    "published": train_published,
    "ours": partial(train_ours, "float32"),
    "bf16": partial(train_ours, "bf16"),
}


def compare(curves: dict[str, np.ndarray], updates: int) -> str:
    """The table of sets of curves [seeds, epochs], and how much the second half of each differs from that of the first."""
    rows = [["updates", *curves]]
    for epoch in range(len(next(iter(curves.values()))[0])):
        columns = [curve[:, epoch] for curve in curves.values()]
        rows.append([f"{(epoch + 1) * updates:,}", *(plus_minus(each.mean(), standard_error(each), 1) for each in columns)])
    lines = [format_table(rows)]
    (first, trusted), *others = ((name, curve[:, curve.shape[1] // 2 :].mean(axis=1)) for name, curve in curves.items())
    for name, late in others:
        interval = bootstrap_difference(late, trusted)
        bounds = "" if interval is None else f" (95 % interval {interval[0]:.1f} .. {interval[1]:.1f})"
        lines.append(f"Second half, {name} - {first}: {late.mean() - trusted.mean():+.1f}{bounds}")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = documented_parser(__doc__)
    parser.add_argument("--dataset", required=True, help="dataset with a simulator")
    parser.add_argument("--agent", type=one_of(AGENTS), default="td3_bc", help=f"one of {', '.join(AGENTS)}")
    parser.add_argument("--variants", type=some_of(VARIANTS), default=["published", "ours"], help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--seeds", type=several(parse_seed), default=[0, 1, 2], help="seeds of each trainer")
    parser.add_argument("--epochs", type=positive(int), default=10)
    parser.add_argument("--updates", type=positive(int), default=500, help="of an epoch")
    parser.add_argument("--steps", type=positive(int), default=5000, help="environment steps of an evaluation")
    parser.add_argument("--mode", type=one_of(MODES), default="eager", help=f"update mode of ours: {', '.join(MODES)}")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ...; auto takes a GPU if there is one")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="append one JSON object a trainer")
    options = parser.parse_args(arguments)
    if options.agent != "td3_bc" and "published" in options.variants:
        parser.error("the published-style trainer is TD3+BC's only; use --variants ours,bf16")
    return options


@tells_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.device = find_device(options.device)
    choose_mode(options.mode, torch.device(options.device), options.updates)  # refuses what cannot work here before the work
    problem = load_problem(options.dataset)
    if problem.spec is None:
        raise DydiffError(f"'{options.dataset}' has no simulator here, so there are no returns to compare.")
    curves = {}
    for name in options.variants:
        curves[name], seconds = VARIANTS[name](problem, options)
        print(f"{name}: {seconds:.1f} s of updates a seed", flush=True)
        if options.json:
            line = {"variant": name, "agent": options.agent, "dataset": problem.dataset.name, "seeds": options.seeds}
            line |= {"updates": options.updates, "returns": curves[name].tolist(), "seconds": seconds}
            line |= describe_machine(options.device)
            append_lines(options.json, [line])
    print(compare(curves, options.updates))


if __name__ == "__main__":
    sys.exit(main())
