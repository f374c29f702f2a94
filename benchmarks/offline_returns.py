"""Does DyDiff beat its base algorithm? TD3+BC and Diffusion-QL, alone and with DyDiff, over several seeds; one report.

    python benchmarks/offline_returns.py --dataset hopper-medium-v2 --seeds 0,1,2
    python benchmarks/offline_returns.py --dataset maze2d-umaze-local --small
    python benchmarks/offline_returns.py --dataset maze2d-umaze-local --small --seeds 3,4      # later: more seeds
    python benchmarks/offline_returns.py --out FOLDER --report-only                            # of what is finished so far

Every combination of --datasets, --algorithms, --methods and --seeds is a run of `run_experiment.py`'s machinery; --workers of them
run side by side, seed by seed, so that an interrupted benchmark compares equal numbers of seeds. The models are trained first, in
the same way, or taken from elsewhere (--models, --diffusion, --dynamics, --reward).

Repeat a command to continue it: what is finished is left alone, what was interrupted or killed goes on from its saved state. With
other seeds, methods, algorithms or datasets it extends the report, which is made of everything finished under --out. Runs whose
settings differ in anything but the seed are never mixed: they are variants of their own.

--out holds one folder a dataset (run folders and the generated experiment files), and report.md, report.json, and a picture a
dataset. Last and best returns are separate columns; intervals are 95 % percentile bootstrap intervals of the mean over seeds.

The defaults are the method's (SPEC): horizon 100, U-Net of 128 channels, 4 M windows, 2000 epochs, each a rollout from 2048 starts
and 500 (Diffusion-QL: 250) updates. They need a GPU. --small is what two CPU cores train; options given beside it win.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from command_line import HORIZON, check_network, documented_parser, input_folder, output_folder, several, some_of, tells_errors
from returns_report import write_report

from dydiff.data import load_dataset
from dydiff.device import find_device
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import ALGORITHMS, load_experiment
from dydiff.experiments.workers import Job, list_jobs, run_jobs, skip_finished
from dydiff.models import DIFFUSION, DYNAMICS, REWARD
from dydiff.options import add_train_options, make_parser, parse_ints, positive, training_settings
from dydiff.options import seed as parse_seed
from dydiff.runs import find_run_of, list_settings, new_folder
from dydiff.runs.model_files import find_model

SECTIONS = {algorithm: section for section, algorithm in ALGORITHMS.items()}
METHODS: dict[str, dict[str, Any]] = {
    "base": {"real_ratio": 1.0},
    "softmax": {"keep_condition": {"filter_type": "softmax"}},
    "hardmax": {"keep_condition": {"filter_type": "hardmax"}},
}
# What --small changes, by option.
SMALL = {
    "horizon": 64,
    "dim": 32,
    "dim_mults": [1, 4],
    "duration": 1.0,
    "batch": 32,
    "lr": 2e-3,
    "ramp": 0.05,
    "one_step_epochs": 30,
    "one_step_updates": 1000,
    "one_step_lr": 1e-3,
    "epochs": 80,
    "starts": 256,
    "rollout_every": 2,
    "eval_every": 2,
}


def run_task(dataset: str, options: argparse.Namespace) -> None:
    """Train what is missing of one dataset: its models, then all policies.

    Raises:
        DydiffError: no such dataset or model, or runs that failed (the others are run all the same); Interrupted by a signal.
    """
    root = options.out / Path(dataset).stem
    root.mkdir(parents=True, exist_ok=True)
    models = find_models(dataset, root, options)
    by_file = [list_jobs(file, changes, root) for file, changes in write_experiments(dataset, root, models, options)]
    by_seed = zip(*by_file, strict=True)
    finish([job for jobs in by_seed for job in jobs], options)


def check_task(dataset: str, options: argparse.Namespace) -> None:
    """Refuse what would end a dataset's trainings, before those of any dataset begin.

    Raises:
        DydiffError: no such dataset or setting.
    """
    load_dataset(dataset)
    with tempfile.TemporaryDirectory() as folder:
        not_yet = dict.fromkeys((DIFFUSION, DYNAMICS, REWARD), "auto")
        for file, changes in write_experiments(dataset, Path(folder), not_yet, options):
            load_experiment(file, changes)


def write_experiments(
    dataset: str, root: Path, models: dict[str, str], options: argparse.Namespace
) -> list[tuple[Path, list[str]]]:
    """Write the experiment files of the policies; each with what --set changes of it."""
    written = []
    for algorithm in options.algorithms:
        others = tuple(f"{SECTIONS[other]}." for other in options.algorithms if other != algorithm)
        changes = [text for text in options.set if not text.startswith(others)]
        for method in options.methods:
            file = root / f"{algorithm}-{method}.yaml"
            write_experiment(file, describe_policy(dataset, algorithm, method, models, options), options.seeds)
            written.append((file, changes))
    return written


def find_models(dataset: str, root: Path, options: argparse.Namespace) -> dict[str, str]:
    """The files of the three models, by kind: given ones, or those trained under `root`, now if they are not there yet."""
    if set(options.methods) == {"base"}:
        return {}
    given = {DIFFUSION: options.diffusion, DYNAMICS: options.dynamics, REWARD: options.reward}
    data = load_dataset(dataset)
    jobs: list[Job] = []
    homes: dict[str, str] = {}
    for kind, path in given.items():
        if path or options.models:
            homes[kind] = str(find_model(options.models or root, kind, data, path or "auto").resolve())
            continue
        job = train_diffusion(dataset, root, options) if kind == DIFFUSION else train_one_step(kind, dataset, root, options)
        homes[kind] = str(job.folder / "model.safetensors")
        jobs.append(job)
    finish(jobs, options)
    return homes


def finish(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Run what is not finished."""
    if pending := skip_finished(jobs):
        run_jobs(pending, [options.device], options.workers)


def train_diffusion(dataset: str, root: Path, options: argparse.Namespace) -> Job:
    """The training of a diffusion model with the options' settings: the one under `root`, or a new one."""
    sizes = {
        "max_length_of_trajectory": options.horizon,
        "dim": options.dim,
        "dim_mults": ",".join(map(str, options.dim_mults)),
        "batch": options.batch,
        "duration": options.duration,
        "tick": 20,
        "lr": options.lr,
        "ramp": options.ramp,
    }
    words = ["-m", dataset, *(f"--{name}={value}" for name, value in sizes.items())]
    parser = make_parser()
    add_train_options(parser)
    folder = find_run_of(list_settings(root), training_settings(parser.parse_args(words)))
    return Job(folder or new_folder(root, f"diffusion-H{options.horizon}"), ["train", *words])


def train_one_step(kind: str, dataset: str, root: Path, options: argparse.Namespace) -> Job:
    """The same for the dynamics ensemble or the reward model."""
    name, section = ("dynamics", "dyn_model_params") if kind == DYNAMICS else ("reward", "model_params")
    params = {"max_epochs": options.one_step_epochs, "steps_per_epoch": options.one_step_updates, "lr": options.one_step_lr}
    file = root / f"{name}.yaml"
    write_experiment(file, {"dataset_name": dataset, section: without_defaults(params)}, [0])
    (job,) = list_jobs(file, [], root)
    return job


def describe_policy(
    dataset: str, algorithm: str, method: str, models: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """The `constants` of an experiment file: what the options and the method change of the defaults."""
    trainer = {
        "num_epochs": options.epochs,
        "num_train_steps_per_train_call": options.updates,
        "num_steps_per_eval": options.eval_steps,
        "eval_freq": options.eval_every,
        # The workers keep all cores busy; and fixed here, it never makes two variants of one.
        "evaluation_worker": False if options.device == "cpu" else None,
        **METHODS[method],
    }
    constants: dict[str, Any] = {
        "dataset_name": dataset,
        SECTIONS[algorithm]: without_defaults({"hidden_dims": options.hidden}),
    }
    if method != "base":
        trainer |= {"rollout_batch_size": options.starts, "rollout_freq": options.rollout_every}
        constants |= {
            "diff_model_params": {"model_paths": [models[DIFFUSION]]},
            "dyn_model_params": {"load_path": models[DYNAMICS]},
            "model_params": {"load_path": models[REWARD]},
            "sampler_kwargs": without_defaults({"iterative_times": options.iterations, "fast": options.fast or None}),
        }
    return {**constants, "rl_trainer_params": without_defaults(trainer)}


def without_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given: None leaves one at its default."""
    return {name: value for name, value in settings.items() if value is not None}


def write_experiment(file: Path, constants: dict[str, Any], seeds: Sequence[int]) -> None:
    """Write an experiment file with one variant a seed."""
    content = {"meta_data": {"exp_name": file.stem}, "variables": {"seed": list(seeds)}, "constants": constants}
    file.write_text("# Written by benchmarks/offline_returns.py\n" + yaml.safe_dump(content, sort_keys=False))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = documented_parser(__doc__)
    add = parser.add_argument
    add("--datasets", "--dataset", type=several(str), default=[], help="D4RL names, local names or files, separated by commas")
    add("--out", type=output_folder, default="training-runs/offline-returns", help="folder of the runs and the report")
    add("--algorithms", type=some_of(SECTIONS), default=["td3_bc", "diffusion_ql"], help=f"some of {','.join(SECTIONS)}")
    add("--methods", type=some_of(METHODS), default=list(METHODS), help=f"some of {','.join(METHODS)}")
    add("--seeds", type=several(parse_seed), default=[0, 1, 2])
    add("--workers", type=positive(int), help="runs side by side (default: one a core, or one on a GPU)")
    add("--device", default="auto", help="cpu, cuda:0, ...; auto takes a GPU if there is one")
    add("--small", action="store_true", help="sizes for two CPU cores: " + ", ".join(f"{k} {v}" for k, v in SMALL.items()))
    add("--report-only", action="store_true", help="train nothing; report on what is finished")
    models = parser.add_argument_group("trained models, instead of training them")
    models.add_argument("--models", type=input_folder, help="folder with finished runs of all three; the newest of each counts")
    models.add_argument("--diffusion", help="diffusion model: run folder or file")
    models.add_argument("--dynamics", help="dynamics ensemble: run folder or file")
    models.add_argument("--reward", help="reward model: run folder or file")
    sizes = parser.add_argument_group("sizes of the models that it trains")
    add = sizes.add_argument
    add("--horizon", type=positive(int), default=HORIZON, help="rows of a rollout")
    add("--dim", type=positive(int), default=128, help="width of the U-Net")
    add("--dim-mults", type=parse_ints, default=[1, 4, 8], help="its widths by level, times dim")
    add("--duration", type=positive(float), default=4.0, help="length of its training, in millions of windows")
    add("--batch", type=positive(int), default=8, help="windows per update")
    add("--lr", type=positive(float), default=1e-3, help="its step size")
    add("--ramp", type=positive(float), default=10.0, help="windows over which its step size grows, in millions")
    add("--one-step-epochs", type=positive(int), help="cap on the epochs of dynamics and reward model")
    add("--one-step-updates", type=positive(int), help="their updates an epoch (default: once through the data)")
    add("--one-step-lr", type=positive(float), help="their step size")
    policies = parser.add_argument_group("sizes of the policy trainings (default: the method's)")
    add = policies.add_argument
    add("--epochs", type=positive(int), help="epochs of rollout, updates and evaluation")
    add("--updates", type=positive(int), help="updates an epoch")
    add("--starts", type=positive(int), help="start states of a rollout")
    add("--rollout-every", type=positive(int), help="epochs from one rollout to the next")
    add("--iterations", type=positive(int), help="policy injections of a rollout")
    add("--fast", action="store_true", help="fast mode: far fewer network evaluations a rollout; not the method's sampler")
    add("--hidden", type=parse_ints, help="hidden widths of policy and critics (Diffusion-QL: of the critics)")
    add("--eval-steps", type=positive(int), help="environment steps of an evaluation, at least")
    add("--eval-every", type=positive(int), help="epochs from one evaluation to the next")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of dydiff/config.py; repeatable")
    if parser.parse_args(arguments).small:
        parser.set_defaults(**SMALL)
    options = parser.parse_args(arguments)
    if not options.datasets and not options.report_only:
        parser.error("name a dataset with --dataset")
    check_network(parser, options)
    # A run is known again by its settings, and paths are among them.
    options.out = options.out.resolve()
    options.datasets = [str(Path(name).resolve()) if Path(name).is_file() else name for name in options.datasets]
    return options


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    status = 0
    try:
        options.device = find_device(options.device)
        cores = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
        options.workers = options.workers or cores
        datasets = [] if options.report_only else options.datasets
        for dataset in datasets:
            check_task(dataset, options)
        for dataset in datasets:
            run_task(dataset, options)
    except DydiffError as error:  # what is finished is reported all the same
        print(f"error: {error}", file=sys.stderr)
        status = 1
    print(write_report(options.out))
    return status


if __name__ == "__main__":
    sys.exit(main())
