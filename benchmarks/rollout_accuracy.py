"""Are DyDiff's rollouts more accurate than a single-step model's? Errors against the simulator by horizon, in one command.

    python benchmarks/rollout_accuracy.py --outdir training-runs --dataset hopper-medium-v2
    python benchmarks/rollout_accuracy.py --outdir training-runs --dataset hopper-medium-v2 --uninjected training-runs/00007-free \\
        --starts 256 --json accuracy.json --plot accuracy.png

Takes the trained models under --outdir as `dydiff report` does (those of the newest policy run) and rolls policies out from the
same states of the data, in the simulator and in the models:

    no motion       a model that stays where it starts: a yardstick
    single-step     the dynamics ensemble, autoregressively
    uninjected      diffusion given the first observation alone: it follows the data's behaviour, whatever the policy does. Needs a
                    model trained with `train.py --cond_on_action False` (--uninjected), or else is not measured
    DyDiff K        the method with K policy injections (--iterations)
    DyDiff fast     its fast mode, with as many injections as the run has
    true states     the reward model and the terminal function on the simulator's own states: what is left of the reward error
                    with a perfect dynamics model

Policies:

    recorded        the data's own actions, open loop, from windows of the data: the behaviour policy itself, noise and all. Without
                    feedback from the policy this is the error of the models alone
    clone           behaviour cloned from the data, closed loop (the average of what the data does in a state)
    TD3+BC          the last policy of the newest TD3+BC run, without DyDiff if there is one (--policy names another)
    perturbed       the same plus a smooth fixed function of the state, of --perturbation root mean square (actions lie in [-1, 1])

Errors are means over the starts ± standard errors:

    position        in mazes, in metres
    state           root mean square over the z-scored observation
    step            the same of each row against the simulator's single step from the model's own row before: not whether the
                    rollout is where the policy would be, but whether its transitions are true
    reward          of one step, absolute
    return          of the sum of rewards until then, absolute; in simulator and model each to its own end of the episode
    ending          the fraction of starts where the episode goes on in one of the two alone

All but the last two count while the simulator's episode goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import documented_parser, output_file, picture_file, several, tells_errors
from machine import describe_machine
from probe_policies import clone_behaviour, distance_from_data, perturb

from dydiff.checkpoint import write_atomically
from dydiff.device import find_device
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.errors import DydiffError
from dydiff.models import DIFFUSION, load_diffusion_model, load_policy
from dydiff.options import positive
from dydiff.options import seed as parse_seed
from dydiff.reports import plots
from dydiff.reports.comparison import (
    SINGLE_STEP,
    Model,
    compare_models,
    draw_cases,
    engine_model,
    uninjected_model,
)
from dydiff.reports.policy_runs import Subject, describe_models, load_subject
from dydiff.reports.tables import format_table, plus_minus
from dydiff.reports.uncertainty import mean_with_error
from dydiff.rollout import Policy
from dydiff.runs.model_files import find_model

UNINJECTED, RECORDED = "uninjected", "recorded"
TITLES = {
    "position": "position error (m)",
    "state": "state error (root mean square of z-scored observations)",
    "step": "error of single steps, from each of the model's own rows to the next (as state error)",
    "reward": "reward error of a step",
    "return": "return error until that step",
    "ending": "fraction of starts where the episode goes on in simulator or model alone",
}
CLONE_SAMPLES = 4096  # states at which a policy's distance from the data is taken


@dataclass
class Probe:
    """A policy to roll out; `act` is None for the data's own actions."""

    name: str
    what: str
    act: Policy | None


def list_models(subject: Subject, options: argparse.Namespace) -> dict[str, Model]:
    """The models that are compared, by name.

    Raises:
        DydiffError: the uninjected model is missing, or none.
    """
    engine = copy.copy(subject.rollouts.engine)
    fast, engine.fast = copy.copy(engine), None
    fast.fast = fast.fast or FastMode()
    models = {SINGLE_STEP: engine_model(engine, 0, options.seed)}
    if options.uninjected:
        dataset = subject.problem.dataset
        file = find_model(options.outdir, DIFFUSION, dataset, options.uninjected)
        models[UNINJECTED] = uninjected_model(load_diffusion_model(file, dataset, options.device), engine, options.seed)
    for count in options.iterations:
        models[f"DyDiff {count}"] = engine_model(engine, count, options.seed)
    models["DyDiff fast"] = engine_model(fast, fast.iterations, options.seed)
    return models


def list_probes(subject: Subject, options: argparse.Namespace) -> list[Probe]:
    """The policies that are rolled out.

    Raises:
        DydiffError: there is no TD3+BC run, and --policy names none.
    """
    problem, transitions = subject.problem, subject.problem.policy_transitions(options.device)
    file = find_policy(subject, options)
    policy = load_policy(file, options.device)
    if policy.manifest["algorithm"] != "td3_bc":
        raise DydiffError(f"'{file}' is a policy of {policy.manifest['algorithm']}, not of TD3+BC. Name another with --policy.")
    clone, error = clone_behaviour(transitions, options.clone_updates, options.seed)
    sizes = problem.dataset.observation_dim, problem.dataset.action_dim
    run = f"{file.parent.name}/{file.name}"
    return [
        Probe(RECORDED, "the data's own actions, open loop", None),
        Probe("clone", f"cloned in {options.clone_updates} updates, mean squared error {error:.3f}", clone),
        Probe("TD3+BC", run, policy.agent.act),
        Probe(
            "perturbed",
            f"{run} and a perturbation of root mean square {options.perturbation:g}",
            perturb(policy.agent.act, *sizes, options.perturbation, options.seed),
        ),
    ]


def find_policy(subject: Subject, options: argparse.Namespace) -> Path:
    """The file of the trained policy: the one named, or the newest TD3+BC run's, one without DyDiff before one with it."""
    product = "agent.safetensors"
    if options.policy:
        return options.policy / product if options.policy.is_dir() else options.policy
    runs = [run for run in subject.runs if run.settings["stage"] == "td3_bc"]
    if not runs:
        raise DydiffError(f"No finished TD3+BC run under '{options.outdir}'. Train one there, or name one with --policy.")
    return max(runs, key=lambda run: (not run.uses_dydiff, subject.runs.index(run))).folder / product


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Compare all models on all policies: the record that --json writes."""
    problem, rollouts = subject.problem, subject.rollouts
    transitions = problem.policy_transitions(options.device)
    models = list_models(subject, options)
    cases = draw_cases(problem, rollouts.engine.horizon, options.starts, options.seed)
    policies: dict[str, Any] = {}
    for probe in list_probes(subject, options):
        began = time.perf_counter()
        closed_loop = probe.act is not None
        comparison = compare_models(models, rollouts, problem, cases.start, probe.act, None if closed_loop else cases)
        deviations = comparison.deviations(problem.spec, problem.spaces, with_steps=True)
        distance = distance_from_data(probe.act, transitions, CLONE_SAMPLES, options.seed) if closed_loop else 0.0
        policies[probe.name] = {
            "what": probe.what,
            "distance_from_data": distance,
            "errors": comparison.errors(deviations),
            "averages": {
                quantity: {name: mean_with_error(values) for name, values in by_model.items()}
                for quantity, by_model in comparison.averages(deviations).items()
            },
            "alive": comparison.alive.sum(axis=0).tolist(),
            "returns": comparison.returns(),
            "endings": comparison.endings(),
        }
        print(f"{probe.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if all(end["differs"]["mean"] == 0 for policy in policies.values() for end in policy["endings"].values()):
        for policy in policies.values():  # no episode ends early in this environment
            del policy["errors"]["ending"], policy["averages"]["ending"], policy["endings"]
    models_record = describe_models(subject.models, problem.dataset, rollouts.engine.dynamics)
    for model in (*models_record["diffusion"], models_record["dynamics"]):
        model["path"] = Path(model["path"]).parent.name
    return {
        "dataset": problem.dataset.name,
        "rows": len(problem.dataset),
        "environment": problem.environment,
        "simulator": problem.simulator,
        "horizon": rollouts.engine.horizon,
        "starts": len(cases.start),
        "seed": options.seed,
        "models": models_record,
        "policies": policies,
        "machine": describe_machine(options.device),
    }


def show(record: dict[str, Any]) -> str:
    """The record as tables: one per policy and quantity, a model a row."""
    last, models = record["horizon"] - 1, record["models"]
    shown = [4**power for power in range(10) if 4**power < last * 0.8] + [last]
    windows = models["diffusion"][0]["training_windows"]
    text = [
        f"Rollouts against the simulator ({record['simulator']}) from {record['starts']} states of {record['dataset']} "
        f"({record['rows']:,} rows), {record['horizon']} rows long: mean ± standard error over the starts.",
        f"Diffusion: {len(models['diffusion'])} model(s) of {models['diffusion'][0]['parameters']:,} parameters"
        + (f", {windows:,} windows" if windows else "")
        + f". Single-step: {models['dynamics']['networks']} networks, {models['dynamics']['parameters']:,} parameters in all.",
    ]
    for name, policy in record["policies"].items():
        returns, endings = dict(policy["returns"]), policy.get("endings")
        truth = returns.pop("")
        text += ["", f"Policy: {name} ({policy['what']}); its actions are {policy['distance_from_data']:.3f} from the data's."]
        for quantity, title in TITLES.items():
            if quantity in policy["errors"]:
                table = _error_table(policy["errors"][quantity], policy["averages"][quantity], policy["alive"], shown)
                text += ["", f"{name}: {title}", table]
        rows = [["model", "return less the simulator's", *["episode ends at another step", "so many steps later"] * bool(endings)]]
        for model, excess in returns.items():
            rows.append([model, plus_minus(*excess.values(), 3, "+")])
            if endings:
                differs, later = endings[model].values()
                rows[-1] += [plus_minus(*differs.values(), 3), plus_minus(*later.values(), 2, "+")]
        text += ["", f"{name}: the whole horizon; the simulator's return is {plus_minus(*truth.values(), 3)}", format_table(rows)]
    if UNINJECTED not in next(iter(record["policies"].values()))["returns"]:
        text += ["", "Diffusion without injection (the behaviour policy's): not measured; --uninjected names a model for it."]
    return "\n".join(text)


def _error_table(errors: dict[str, Any], averages: dict[str, Any], alive: list[int], shown: Sequence[int]) -> str:
    rows = [["model", *(f"step {step}" for step in shown), "all steps"]]
    for model, values in errors.items():
        cells = [(values["mean"][step], values["standard_error"][step]) for step in shown] + [averages[model].values()]
        rows.append([model, *(plus_minus(*cell, 3) for cell in cells)])
    return format_table([*rows, ["starts alive", *(str(alive[step]) for step in shown), ""]])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = documented_parser(__doc__)
    add = parser.add_argument
    add("--outdir", type=Path, default=Path("training-runs"), help="folder with the runs")
    add("--dataset", required=True, help="dataset that they were trained on")
    add("--policy", type=Path, metavar="RUN", help="TD3+BC policy: run folder or file")
    add("--uninjected", metavar="RUN", help="diffusion model trained with --cond_on_action False: run folder or file")
    add("--iterations", type=several(positive(int)), default=[1, 2, 5], help="policy injections of DyDiff")
    add("--perturbation", type=positive(float), default=0.5, help="size of the perturbed policy's perturbation")
    add("--clone-updates", type=positive(int), default=3000, help="updates of the cloned behaviour")
    add("--starts", type=positive(int), default=64, help="start states")
    add("--seed", type=parse_seed, default=0, help="of everything random")
    add("--device", default="auto", help="cpu, cuda:0, ...; auto takes a GPU if there is one")
    add("--json", type=output_file, metavar="FILE", help="write all numbers")
    add("--plot", type=picture_file, metavar="FILE", help="draw the errors over the horizon")
    return parser.parse_args(arguments)


@tells_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.device = find_device(options.device)
    record = measure(load_subject(options.outdir, options.dataset, options.device), options)
    print(show(record))
    if options.json:
        write_atomically(options.json, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    if options.plot:
        plots.draw_errors({name: policy["errors"] for name, policy in record["policies"].items()}, options.plot)


if __name__ == "__main__":
    sys.exit(main())
