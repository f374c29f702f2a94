"""The command line of the benchmarks: options that several have, values that are refused before the work, errors in a line."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dydiff.errors import DydiffError
from dydiff.options import Parser, parse_ints, positive

FULL_SIZE = 128, (1, 4, 8)  # dim and dim_mults of the U-Net
HORIZON = 100
PICTURES = (".png", ".pdf", ".svg")


def documented_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser that shows a script's documentation: its first line above the options, the rest below."""
    description, _, details = documentation.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(description=description, epilog=details, allow_abbrev=False, formatter_class=formatter)


def make_timing_parser(documentation: str, quick: str) -> argparse.ArgumentParser:
    """The same with the options that every timing benchmark has; `quick` says what --quick changes."""
    parser = documented_parser(documentation)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ...; auto takes a GPU if there is one")
    seconds = "how long to time each variant of a case (default: 10, --quick: 2)"
    parser.add_argument("--seconds", type=positive(float), help=seconds)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="append one JSON object a line")
    parser.add_argument("--plot", type=picture_file, metavar="FILE", help="draw times and shares of the matrix rate")
    return parser


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The U-Net's size."""
    width = "width of the network; a small one to try things out"
    parser.add_argument("--dim", type=positive(int), default=FULL_SIZE[0], help=width)
    parser.add_argument("--dim-mults", type=parse_ints, default=list(FULL_SIZE[1]), help="widths by level, times dim")


def network_size(options: argparse.Namespace) -> tuple[int, tuple[int, ...]]:
    """dim and dim_mults of the U-Net: those of the options, or the full size where there are no such options."""
    return getattr(options, "dim", FULL_SIZE[0]), tuple(getattr(options, "dim_mults", FULL_SIZE[1]))


def describe_size(options: argparse.Namespace) -> str:
    """What a reader must know of the network that the options ask for; nothing of a full-size one."""
    size = network_size(options)
    return "" if size == FULL_SIZE else f"small network: dim {size[0]}, multiples {','.join(map(str, size[1]))}"


def check_network(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a U-Net that cannot be, before the first of several is timed: --horizon is a number, several, or left to be chosen."""
    import torch  # only here: what imports this module must start without, and answer typing mistakes at once

    from dydiff.networks.unet import UNet

    horizons = options.horizon if isinstance(options.horizon, list) else [options.horizon or HORIZON]
    for horizon in horizons:
        try:
            with torch.device("meta"):
                UNet(1, horizon, *network_size(options))
        except DydiffError as error:
            parser.error(str(error))


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """One of these names; a misspelt one is told the nearest."""
    names = list(names)

    def parse(text: str) -> str:
        if text not in names:
            nearest = difflib.get_close_matches(text, names, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise argparse.ArgumentTypeError(f"there is no '{text}'{hint}; choose from {', '.join(names)}")
        return text

    return parse


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Some of these names, separated by commas."""
    return several(one_of(names))


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Different values of a kind, separated by commas."""

    def parse(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"'{text}' names something twice")
        return values

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def output_file(text: str) -> Path:
    """A file that can be written; its folder is made."""
    path = Path(os.path.expanduser(text))
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it is write-protected")
        _try_folder(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write '{text}' ({error.strerror}); name another file") from error
    return path


def output_folder(text: str) -> Path:
    """A folder that can be written into; it is made."""
    path = Path(os.path.expanduser(text))
    try:
        _try_folder(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into '{text}' ({error.strerror}); name another folder") from error
    return path


def input_folder(text: str) -> Path:
    """A folder that is there."""
    path = Path(os.path.expanduser(text))
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{text}'")
    return path


def _try_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def picture_file(text: str) -> Path:
    """The same of a picture."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"'{text}' does not end in {', '.join(PICTURES)}, so it would be no picture")
    return output_file(text)


def tells_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """A main function whose DydiffErrors are told in a line, with exit status 1."""

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        try:
            return main(*arguments) or 0
        except DydiffError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("error: interrupted.", file=sys.stderr)
            return 130

    return run
