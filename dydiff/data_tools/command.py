"""`dydiff data`: list, inspect, validate, convert and download datasets, and tell which simulator made one.

Only the standard library is imported before an action is known to be valid: `--help` and typing mistakes answer at once.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from dydiff.errors import DydiffError
from dydiff.options import seed, user_path

NAME_HELP = "dataset: D4RL name, local name, Minari id, or path to an HDF5 or .npz file"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of `dydiff data`, by action."""
    make_parser = functools.partial(type(parser), allow_abbrev=False, formatter_class=parser.formatter_class)
    subparsers = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=make_parser)
    parsers = {
        name: subparsers.add_parser(name, description=run.__doc__, help=run.__doc__) for name, run in ACTIONS.items()
    }

    parsers["list"].add_argument("word", nargs="?", default="", help="show only names that hold this word")
    parsers["list"].add_argument("--here", action="store_true", help="show only datasets that are on this machine")
    for name in ("inspect", "validate", "check-dynamics"):
        parsers[name].add_argument("dataset", help=NAME_HELP)
    for name in ("validate", "check-dynamics"):
        parsers[name].add_argument("--environment", default=None, help="environment, where neither name nor file tells it")
    picture = "PNG to write; without it, NAME.png in the working folder"
    parsers["inspect"].add_argument("--picture", type=user_path, default=None, help=picture)
    parsers["convert"].add_argument("dataset", help=NAME_HELP)
    parsers["convert"].add_argument("target", type=user_path, help="file to write: .hdf5 or .npz")
    parsers["convert"].add_argument("--force", action="store_true", help="replace the target if it exists")
    parsers["download"].add_argument("datasets", nargs="+", metavar="dataset", help="D4RL name or Minari id")
    parsers["check-dynamics"].add_argument("--rows", type=int, default=1000, help="steps that are taken again, at most")
    parsers["check-dynamics"].add_argument("--seed", type=seed, default=0, help="of the choice of the steps")


def run_data(options: argparse.Namespace) -> None:
    """List, inspect, validate, convert or download datasets, or tell which simulator made one."""
    ACTIONS[options.action](options)


def run_list(options: argparse.Namespace) -> None:
    """List the datasets that have names, and which of them are on this machine."""
    from dydiff.data import d4rl
    from dydiff.data.minari_reader import list_minari

    print(f"Folder: {d4rl.cache_folder()}")
    for name in (*d4rl.FILES, *d4rl.local_names()):
        path = d4rl.dataset_path(name)
        size = f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "-"
        if options.word in name and not (options.here and size == "-"):
            print(f"{name:32}{size:>12}  {path.name}")
    for name in list_minari():
        if options.word in name:
            print(f"{name:32}{'Minari':>12}")


def run_inspect(options: argparse.Namespace) -> None:
    """Print a dataset's sizes, episodes, returns and ranges, and draw them."""
    from dydiff.data import read_dataset
    from dydiff.data_tools import inspection

    raw = read_dataset(options.dataset)
    figures = inspection.inspect(raw)
    print(f"dataset       {raw.name}{f' ({raw.path})' if raw.path else ''}")
    print(f"environment   {_environment_of(raw, None) or 'unknown'}")
    for key, value in raw.metadata.items():
        print(f"metadata      {key}: {value}")
    print(inspection.describe(figures))
    picture = Path(options.picture or f"{Path(raw.name).name}.png")
    picture = picture if picture.suffix else picture.with_suffix(".png")
    inspection.draw(figures, picture)
    print(f"Picture: {picture}")


def run_validate(options: argparse.Namespace) -> None:
    """List everything that is wrong with a dataset, with the rows; status 1 if anything is."""
    from dydiff.data import read_dataset
    from dydiff.data_tools.validation import find_problems

    raw = read_dataset(options.dataset)
    findings = find_problems(raw, _environment_of(raw, options.environment))
    for finding in findings:
        print(finding)
    defects = sum(finding.is_defect for finding in findings)
    if defects:
        raise DydiffError(f"Dataset {raw.name!r} has {defects} defect{'s' if defects > 1 else ''}, listed above.")
    print(f"{raw.name}: no defects in {len(raw.arrays['observations']):,} rows")


def run_convert(options: argparse.Namespace) -> None:
    """Write a dataset to another file, HDF5 or .npz, with all its arrays and metadata."""
    from dydiff.data import dataset_from_arrays, read_dataset, write_dataset
    from dydiff.data.writer import check_suffix

    target = check_suffix(options.target)
    if target.exists() and not options.force:
        raise DydiffError(f"{str(target)!r} exists. Give another target, or --force to replace it.")
    raw = read_dataset(options.dataset)
    dataset_from_arrays(raw.arrays, raw.name, raw.path)  # what is wrong is the source's fault, not the target's
    print(f"Dataset: {write_dataset(target, raw.arrays, raw.metadata)}")


def run_download(options: argparse.Namespace) -> None:
    """Download datasets of D4RL or Minari; an interrupted download goes on where it stopped."""
    from dydiff.data import download_dataset
    from dydiff.data.minari_reader import download_minari, is_minari_id

    for name in options.datasets:
        if is_minari_id(name):
            download_minari(name)
            print(f"Dataset: {name}")
        else:
            print(f"Dataset: {download_dataset(name)}")


def run_check_dynamics(options: argparse.Namespace) -> None:
    """Take a dataset's steps again on every simulator, and print how far they part."""
    from dydiff.data import read_dataset
    from dydiff.data_tools.dynamics_check import check_dynamics, describe
    from dydiff.data_tools.validation import check_structure

    if options.rows < 1:
        raise DydiffError(f"--rows must be at least 1, not {options.rows}.")
    raw = read_dataset(options.dataset)
    environment = _environment_of(raw, options.environment)
    if environment is None:
        raise DydiffError(f"Dataset {raw.name!r} does not say which environment it is from. Give it by --environment.")
    problems = check_structure(raw.arrays)
    if problems:
        raise DydiffError(f"Dataset {raw.name!r} cannot be replayed: {'; '.join(problem.text for problem in problems)}.")
    steps, errors = check_dynamics(raw, environment, options.rows, options.seed)
    print(describe(errors, steps))


def _environment_of(raw, given: str | None) -> str | None:
    """The environment's name: as given, else from the metadata, else from the dataset's name."""
    from dydiff.data.dataset import environment_of_file
    from dydiff.environments import choose_environment

    return environment_of_file(raw.name, raw.metadata) if given is None else choose_environment(given)


ACTIONS = {
    "list": run_list,
    "inspect": run_inspect,
    "validate": run_validate,
    "convert": run_convert,
    "download": run_download,
    "check-dynamics": run_check_dynamics,
}
