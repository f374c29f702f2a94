"""The options of the commands of `dydiff`, and how their values are read; `dydiff data` keeps its own.

Only the standard library is imported: `--help` and typing mistakes answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dydiff.errors import DydiffError

RUNS = "training-runs"  # where runs go, and where stages look for each other's results
MAX_SEED = 2**63 - 1  # as in experiment files


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest valid option for an unknown one."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        # The parser of a command refuses what it does not know itself: it knows which options there are.
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            near = difflib.get_close_matches(word.partition("=")[0], options, n=1) if word.startswith("-") else []
            if "unrecognized" in message and near:
                message += f" (did you mean {near[0]}?)"
        super().error(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there is something to tell: not of what is off or absent until it is given."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.default is None or action.nargs == 0 or action.default in ("", []) or "(default:" in text
        return text if told else super()._get_help_string(action)


# Abbreviations are refused: a new option must not change what an old command means.
make_parser = functools.partial(Parser, allow_abbrev=False, formatter_class=Help)


def parse_bool(text: str) -> bool:
    """True and False as people type them: True, false, 1, no, ..."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return words[text.lower()]


def parse_ints(text: str) -> list[int]:
    """A comma-separated list of whole numbers above 0, as in 1,4,8."""
    try:
        return [positive(int)(part) for part in text.strip("[]").split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers above 0 such as 1,4,8") from error


def parse_floats(text: str) -> list[float]:
    """A comma-separated list of numbers above 0, as in 0.3,0.8."""
    try:
        return [positive(float)(part) for part in text.strip("[]").split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers above 0 such as 0.3,0.8") from error


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A finite number of the given kind above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
        return value

    parse.__name__ = kind.__name__
    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def whole(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    value = int(text)
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MAX_SEED}")
    return value


def shard(text: str) -> tuple[int, int]:
    """Which of how many parts, counted from 1, as in 2/8."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a part of a whole, from 1/N to N/N, such as 2/8")
    return int(part), int(parts)


def user_path(text: str) -> str:
    """A path whose `~` is the home folder: in --outdir=~/runs the shell leaves it as it is."""
    return os.path.expanduser(text)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The options of train.py (SPEC section 9)."""
    number, count = positive(float), positive(int)
    parser.add_argument("-m", "--dataset", required=True, help="dataset: D4RL name, local name, or path to an HDF5 file")
    parser.add_argument("--outdir", type=user_path, default=RUNS, help="where the run folder goes")
    parser.add_argument("--name", default="", help="added to the run folder's name")
    parser.add_argument("--max_length_of_trajectory", type=count, default=100, help="horizon H of the model, in rows")
    parser.add_argument("--rl_model_type", default="UNet_RL", help="network: UNet_RL, Transformer_RL or MLP_RL")
    parser.add_argument("--dim", type=count, default=None, help="base width of the network (default: the network's own)")
    parser.add_argument("--dim_mults", type=parse_ints, default=None, help="UNet_RL's widths by level, times dim (default: 1,4,8)")
    parser.add_argument("--include_action", type=parse_bool, default=True, help="model actions beside observations")
    parser.add_argument("--use_cond", type=parse_bool, default=True, help="show the clean first observation in training")
    parser.add_argument("--cond_on_action", type=parse_bool, default=True, help="show the clean actions in training")
    parser.add_argument(
        "--foreign_actions",
        type=share,
        default=0.0,
        help="share of windows that are shown another window's later actions, so that none is read out of them (published: 0)",
    )
    parser.add_argument("--batch", type=count, default=8, help="windows per update")
    parser.add_argument("--batch-gpu", type=count, default=None, help="at most so many windows at a time (memory)")
    parser.add_argument("--duration", type=number, default=4.0, help="length of training, in millions of windows")
    parser.add_argument("--tick", type=number, default=1.0, help="how often to log, in thousands of windows")
    parser.add_argument("--snap", type=whole, default=0, help="write a snapshot of the model every so many ticks (0: never)")
    parser.add_argument(
        "--dump",
        type=count,
        default=50,
        help="write the state for --resume every so many ticks; less often where that would take over a twentieth of the time",
    )
    parser.add_argument("--lr", type=number, default=1e-3, help="Adam's step size, reached at the end of --ramp")
    parser.add_argument("--ramp", type=number, default=10.0, help="windows over which the step size grows to --lr, in millions")
    parser.add_argument("--ema", type=number, default=0.5, help="half-life of the weights' average, in millions of windows")
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bf16", "winograd"],
        default="auto",
        help="of UNet_RL's products; weights and their update stay float32; auto: bf16 in hardware, winograd on other CPUs",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of everything random")
    parser.add_argument("--device", default="auto", help="cuda:0, cpu, ...; auto takes a GPU if there is one")
    resumed = "run folder to continue with the same options"
    parser.add_argument("--resume", type=user_path, default=None, metavar="RUN", help=resumed)
    parser.add_argument("--folder", default=None, help=argparse.SUPPRESS)  # for `workers.run_jobs`: the very run folder
    add_parent_option(parser)
    parser.add_argument("-n", "--dry-run", action="store_true", help="load and check everything, print it, and stop")


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a diffusion training, of the options of train.py; it is stored in the run folder.

    Raises:
        DydiffError: the options contradict each other.
    """
    if options.cond_on_action and not options.include_action:
        raise DydiffError("--cond_on_action=True needs --include_action=True: there are no actions to condition on.")
    if options.foreign_actions and not options.cond_on_action:
        raise DydiffError("--foreign_actions needs --cond_on_action=True: without it no actions are shown at all.")
    if options.foreign_actions and options.max_length_of_trajectory < 2:
        raise DydiffError("--foreign_actions needs --max_length_of_trajectory of at least 2: it changes what follows one action.")
    if options.dim_mults is not None and options.rl_model_type != "UNet_RL":
        raise DydiffError(f"--dim_mults goes with --rl_model_type=UNet_RL, not with {options.rl_model_type}: leave it out.")
    return {
        "dataset_name": options.dataset,
        "network": {
            "kind": options.rl_model_type,
            "horizon": options.max_length_of_trajectory,
            "dim": options.dim,
            "dim_mults": options.dim_mults or [1, 4, 8],
        },
        "include_action": options.include_action,
        "use_cond": options.use_cond,
        "cond_on_action": options.cond_on_action,
        "batch_size": options.batch,
        "micro_batch": options.batch_gpu,
        "duration": max(round(options.duration * 1e6), 1),
        "tick": max(round(options.tick * 1e3), 1),
        "lr": options.lr,
        "lr_ramp": options.ramp * 1e6,
        "half_life": options.ema * 1e6,
        "precision": options.precision,
        "seed": options.seed,
        # Left out where it changes nothing: so trainings that began before there was this option go on.
        **({"foreign_actions": options.foreign_actions} if options.foreign_actions else {}),
    }


def training_options(settings: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `training_settings`: options of train.py, in their units, for those settings."""
    network = settings["network"]
    return {
        "--dataset": settings["dataset_name"],
        "--rl_model_type": network["kind"],
        "--max_length_of_trajectory": network["horizon"],
        "--dim": network["dim"],
        "--dim_mults": network["dim_mults"],
        "--batch-gpu": settings["micro_batch"],
        "--duration": settings["duration"] / 1e6,
        "--tick": settings["tick"] / 1e3,
        "--ramp": settings["lr_ramp"] / 1e6,
        "--ema": settings["half_life"] / 1e6,
        "--batch": settings["batch_size"],
        "--foreign_actions": settings.get("foreign_actions", 0.0),
        **{f"--{name}": settings[name] for name in ("include_action", "use_cond", "cond_on_action", "lr", "precision", "seed")},
    }


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of run_experiment.py (SPEC section 9)."""
    parser.add_argument("-e", "--experiment", type=user_path, required=True, help="experiment file (YAML)")
    parser.add_argument("--dataset", default=None, help="another dataset, with its entry in exp_specs/datasets.yaml applied")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any setting; repeatable")
    parser.add_argument("--device", default=None, help="cpu, cuda:0, ...; default: the file's gpu ids")
    parser.add_argument("--outdir", type=user_path, default=RUNS, help="where run folders go and trained models are looked for")
    parser.add_argument(
        "--resume", action="store_true", help="continue what is unfinished, and policies that now have more epochs; skip the rest"
    )
    part = "run only this part of the runs, 1/N to N/N: for N jobs of a cluster, each with the same command otherwise"
    parser.add_argument("--list", action="store_true", help="show the runs, and what is there of each, and stop")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help=part)


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """The options of one variant's process: those of its sweep, and which variant, where."""
    add_run_options(parser)
    parser.add_argument("--variant", type=int, nargs="+", required=True)
    parser.add_argument("--folder", type=Path, nargs="+", required=True)
    add_parent_option(parser)


def add_parent_option(parser: argparse.ArgumentParser) -> None:
    """For `workers.run_jobs`: whether this process saves and stops when the one that started it ends, however that ends."""
    parser.add_argument("--end_with_parent", action="store_true", help=argparse.SUPPRESS)


def add_collect_options(parser: argparse.ArgumentParser) -> None:
    """The options of `dydiff collect`."""
    parser.add_argument("name", help="dataset to make, for example maze2d-umaze-local or hopper-medium-local")
    parser.add_argument("--steps", type=positive(int), default=1_000_000, help="environment steps")
    parser.add_argument("--seed", type=seed, default=0, help="of everything random")
    where = "file to write, .hdf5 or .npz (default: the dataset's place in the cache folder)"
    parser.add_argument("--path", type=user_path, default=None, help=where)
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--processes", type=positive(int), default=None, help="that record locomotion (default: one a core)")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The options of `dydiff report`."""
    parser.add_argument("--outdir", type=user_path, default=RUNS, help="folder with the runs to report on")
    parser.add_argument("--dataset", required=True, help="dataset that the runs were trained on")
    parser.add_argument("--starts", type=positive(int), default=64, help="rollouts that are compared with the simulator")
    parser.add_argument("--seed", type=seed, default=0, help="of the comparison")
    parser.add_argument("--device", default="auto", help="cuda:0, cpu, ...; auto takes a GPU if there is one")


def add_sampler_quality_options(parser: argparse.ArgumentParser) -> None:
    """The options of `dydiff sampler-quality`: the report's, and the grid of fast mode's settings."""
    add_report_options(parser)
    parser.add_argument("--first", type=parse_ints, default=[20, 14, 10, 8, 5], help="evaluations of fast mode's first iteration")
    parser.add_argument("--warm", type=parse_ints, default=[7, 5, 3, 2], help="evaluations of its later iterations")
    parser.add_argument("--warm_sigma", type=parse_floats, default=[0.3, 0.8], help="noise levels of its warm start")


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """The options of `dydiff import`."""
    published = "published network-snapshot-*.pkl, dynamics or reward .pkl, or policy snapshot"
    parser.add_argument("file", type=user_path, help=published)
    parser.add_argument("--dataset", required=True, help="dataset that it was trained on")
    parser.add_argument("--environment", default=None, help="environment, where neither name nor file of the dataset tells it")
    parser.add_argument("--horizon", type=positive(int), default=None, help="of a diffusion model whose file does not say it")
    written = "checkpoint to write (default: the file's name with .safetensors)"
    parser.add_argument("--out", type=user_path, default=None, help=written)
