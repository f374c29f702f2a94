"""The command line: `dydiff COMMAND`, and the older entry points train.py and run_experiment.py on top of it.

Only the standard library is imported before a command is known to be valid: `--help` and typing mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dydiff.data_tools.command import add_data_options, run_data
from dydiff.errors import DydiffError, Interrupted
from dydiff.options import (
    add_collect_options,
    add_import_options,
    add_report_options,
    add_run_options,
    add_sampler_quality_options,
    add_train_options,
    add_worker_options,
    make_parser,
    training_options,
    training_settings,
)


def run_train(options: argparse.Namespace) -> None:
    """Train a diffusion model."""
    work = training_settings(options)
    from dydiff.device import find_device
    from dydiff.experiments.stages import train_diffusion
    from dydiff.runs import find_unfinished, new_folder, nothing_left_empty

    device, root = find_device(options.device), Path(options.outdir)
    with nothing_left_empty(root) as made:
        if options.resume is not None:
            # How long a run is has no influence on what it does until then.
            folder = find_unfinished(Path(options.resume), work, ["duration"], training_options)
        elif options.folder is not None:
            folder = Path(options.folder)
        elif options.dry_run:
            folder = root
        else:
            label = f"{Path(options.dataset).stem}-{options.rl_model_type}-H{options.max_length_of_trajectory}"
            folder = new_folder(root, "-".join(filter(None, [label, f"s{options.seed}", options.name])))
            made.append(folder)
        options.to_resume = ["--resume", str(folder)]
        train_diffusion(
            **work,
            folder=folder,
            settings=work,
            snapshot_ticks=options.snap,
            state_ticks=options.dump,
            device=device,
            dry_run=options.dry_run,
        )
    if not options.dry_run:
        print(f"Diffusion model: {folder / 'model.safetensors'}")


def run_experiment(options: argparse.Namespace) -> None:
    """Run every variant of an experiment file."""
    from dydiff.experiments.workers import run_all, show_runs

    what, root = (options.experiment, options.set, options.dataset), Path(options.outdir)
    if options.list:
        print(show_runs(*what, root, options.shard))
    else:
        options.to_resume = ["--resume"]
        run_all(*what, options.device, root, options.resume, options.shard)


def run_worker(options: argparse.Namespace) -> None:
    """Run one variant in a given folder, or several seeds in theirs: what `run` starts for each of several variants."""
    from dydiff.experiments.workers import run_job

    run_job(
        *(options.experiment, options.set, options.dataset, options.device, Path(options.outdir)),
        indices=options.variant,
        folders=options.folder,
    )


def run_collect(options: argparse.Namespace) -> None:
    """Make a dataset with a local behaviour policy, in D4RL's schema."""
    from dydiff.collecting.collect import collect

    path = collect(options.name, options.steps, options.seed, options.path, processes=options.processes, force=options.force)
    print(f"Dataset: {path}")


def run_report(options: argparse.Namespace) -> None:
    """Compare trained models with the simulator and policies with each other; prints tables, draws PNGs."""
    from dydiff.device import find_device
    from dydiff.reports.report import report

    report(Path(options.outdir), options.dataset, options.starts, options.seed, find_device(options.device))


def run_sampler_quality(options: argparse.Namespace) -> None:
    """Measure what fewer network evaluations cost in rollout error, over a grid of sampler settings on trained models."""
    from dydiff.device import find_device
    from dydiff.reports.sampler_quality import measure_quality

    grid = options.first, options.warm, options.warm_sigma
    device = find_device(options.device)
    measure_quality(Path(options.outdir), options.dataset, *grid, options.starts, options.seed, device)


def run_import(options: argparse.Namespace) -> None:
    """Turn a published checkpoint (a pickle) into one of dydiff's, without running anything that is in it."""
    from dydiff.experiments.policy_stage import make_importer
    from dydiff.importing import read_file
    from dydiff.problem import load_problem

    file = Path(options.file)
    out = Path(options.out) if options.out else file.with_suffix(".safetensors")
    if out.exists():
        raise DydiffError(f"'{out}' exists. Remove it, or name another file with --out.")
    content = read_file(file)
    importer = make_importer(load_problem(options.dataset, options.environment), options.horizon)
    product = importer.read(content, file.name)
    importer.save(product, out)
    for note in product.notes:
        print(note)
    print(f"{product.kind.capitalize()}: {out}")


class ShowVersions(argparse.Action):
    """The option that prints what an installation is made of, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> None:
        from dydiff.versions import describe_installation

        print(describe_installation())
        parser.exit()


COMMANDS = {
    "train": (add_train_options, run_train),
    "run": (add_run_options, run_experiment),
    "collect": (add_collect_options, run_collect),
    "import": (add_import_options, run_import),
    "data": (add_data_options, run_data),
    "report": (add_report_options, run_report),
    "sampler-quality": (add_sampler_quality_options, run_sampler_quality),
    "worker": (add_worker_options, run_worker),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dydiff` command; returns the exit status."""
    with ready_for_terminals():
        return run_command(arguments)


def run_command(arguments: Sequence[str] | None) -> int:
    """Run the command that the arguments name; returns the exit status."""
    parser = make_parser(prog="dydiff", description="Policy-injected trajectory diffusion for offline reinforcement learning.")
    parser.add_argument("--version", action=ShowVersions, nargs=0, help="show versions, compiled parts and devices, and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=make_parser)
    for name, (add_options, run) in COMMANDS.items():
        hidden = {} if name == "worker" else {"help": run.__doc__}
        add_options(subparsers.add_parser(name, description=run.__doc__, **hidden))
    options = parser.parse_args(arguments)
    options.typed = ["dydiff", *(sys.argv[1:] if arguments is None else arguments)]
    return guarded(COMMANDS[options.command][1], options)


def main_of(command: str, prog: str, arguments: Sequence[str] | None = None) -> int:
    """One command as a program of its own, for train.py and run_experiment.py."""
    add_options, run = COMMANDS[command]
    parser = make_parser(prog=prog, description=run.__doc__)
    add_options(parser)
    with ready_for_terminals():
        options = parser.parse_args(arguments)
        options.typed = ["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
        return guarded(run, options)


@contextlib.contextmanager
def ready_for_terminals() -> Iterator[None]:
    """Let nothing that is done to a command from outside, or that a terminal cannot show, end it with a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: not every locale has a plus-minus
    with quiet_without_readers(), interrupted_by_signals():
        yield


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let what asks for the end by default end the command as Ctrl-C does: tidied up, and told."""

    def interrupt(*ignored: object) -> None:
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    heeded = heeded if threading.current_thread() is threading.main_thread() else []
    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def quiet_without_readers() -> Iterator[None]:
    """End without a word, and as SIGPIPE ends other tools, where whoever read our output has gone, as in `| head -1`."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # when Python ends it would be too late
    except BrokenPipeError as error:
        closed = [descriptor for descriptor in (1, 2) if has_no_reader(descriptor)]
        if not closed:  # another pipe, and a defect
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in closed:
            os.dup2(nowhere, descriptor)
        raise SystemExit(128 + signal.SIGPIPE) from error


def has_no_reader(descriptor: int) -> bool:
    """Tell whether a file descriptor is a pipe or a socket whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def guarded(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a command; a DydiffError becomes one paragraph on stderr and status 1."""
    try:
        if getattr(options, "end_with_parent", False):
            from dydiff.experiments.workers import end_with_parent

            end_with_parent()
        run(options)
    except DydiffError as error:
        print(f"error: {error}{how_to_go_on(options) if isinstance(error, Interrupted) else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; what is not saved yet is lost.", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, MemoryError) as error:
        told = explain_shortage(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1
    return 0


def how_to_go_on(options: argparse.Namespace) -> str:
    """The command that resumes what a signal stopped; of a worker the command that started it is the one to repeat."""
    if getattr(options, "end_with_parent", False) or not hasattr(options, "to_resume"):
        return ""
    return f" Go on with: {shlex.join([*options.typed, *([] if options.resume else options.to_resume)])}"


def explain_shortage(error: Exception) -> str | None:
    """What to tell where disk or memory ran out in a place that has no better words for it; None for any other error."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f"'{error.filename}'" if error.filename else "a file"
        return f"Cannot write {where}: {error.strerror}. Free space; what was saved before is untouched." if full else None
    from dydiff.memory import is_out_of_memory

    reason = " ".join(str(error).split())[:300]
    return f"Out of memory ({reason}). End what else runs there, or ask for less at once." if is_out_of_memory(error) else None


if __name__ == "__main__":
    sys.exit(main())
