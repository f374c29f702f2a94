"""How the Triton kernels are launched: tiles to choose from, the choice for a shape, and a launch as a value.

Every tile in TILES is compiled offline by tests/test_offline_compile.py. `choose` takes a measured choice from
launch_table.json where `python profiling/tune_kernels.py` has written one for this family of cards and class of shapes,
and otherwise the largest tile that fills the card: a rule of thumb, unmeasured. Nothing is ever tuned on a user's first call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("launch_table.json")
# Programs that keep the smaller cards of a family busy: an A100 has 108 multiprocessors, an H100 132.
BUSY = 100
COLUMN_CLASSES = (32, 64, 128, 256, 512, 1024)
ROW_CLASSES = (32, 64, 128, 256)


class Tile(NamedTuple):
    """Output rows and columns of one program, K a step, warps, and steps in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def stage_bytes(self) -> int:
        return 2 * self.depth * (self.rows + self.columns)


# From large to small. "conv" is the two-pass way (any shape), "block" one kernel a block (whole samples, whole groups).
TILES = {
    "sm_90": {
        "conv": [
            Tile(128, 256, 64, 8, 4),
            Tile(128, 128, 64, 8, 4),
            Tile(128, 64, 64, 4, 4),
            Tile(64, 64, 64, 4, 6),
            Tile(64, 32, 64, 4, 6),
        ],
        "block": [Tile(128, 128, 64, 8, 4), Tile(256, 64, 64, 8, 4), Tile(64, 128, 64, 4, 5), Tile(64, 32, 64, 4, 6)],
    },
    "sm_80": {
        "conv": [Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 5)],
        "block": [Tile(128, 128, 32, 8, 4), Tile(256, 64, 32, 8, 4), Tile(64, 128, 32, 8, 4), Tile(64, 32, 64, 4, 5)],
    },
}
TWO_PASS = "two-pass"  # in the table, for a block that is faster as a convolution and a pass for the normalisation
# Shared memory that a block may have, in KiB, by compute capability (CUDA C++ programming guide).
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


def family(capability: int) -> str:
    """The list of tiles for a card: "sm_90" with wgmma and TMA, "sm_80" for all others (120 has no wgmma)."""
    return "sm_90" if 90 <= capability < 120 else "sm_80"


def fits_card(tile: Tile, capability: int) -> Tile:
    """The tile with as many stages as the card's shared memory holds."""
    room = SHARED_KIB.get(capability, 99) * 1024 // tile.stage_bytes
    return tile._replace(stages=max(min(tile.stages, room), 1))


def round_to_class(number: int, classes: tuple[int, ...]) -> int:
    """The smallest class that holds the number, or the largest there is."""
    return next((limit for limit in classes if number <= limit), classes[-1])


def shape_class(kind: str, rows: int, columns: int, length: int) -> str:
    """What the table knows a shape by: kernel, columns, positions of a sample where they matter, and few or many rows."""
    many = rows * columns >= BUSY * 128 * 128
    positions = f" length {round_to_class(length, ROW_CLASSES)}" if kind == "block" else ""
    return f"{kind} columns {round_to_class(columns, COLUMN_CLASSES)}{positions} {'many' if many else 'few'}"


def suits(tile: Tile, columns: int) -> bool:
    """Whether a tile is not much wider than the output; the narrow ones serve any, and the widest spills if it is wider."""
    return tile.columns <= 64 or (tile.columns < 2 * columns and tile.columns <= max(columns, 128))


def choose(
    kind: str, capability: int, rows: int, columns: int, length: int, worth: Callable[[Tile], float] = lambda tile: 1.0
) -> Tile | None:
    """The tile for an output of this many rows and columns, L positions a sample.

    None if no tile is worth anything, or the table says that two passes are better than a block.
    """
    tiles = [tile for tile in TILES[family(capability)][kind] if worth(tile) > 0]
    if not tiles:
        return None
    measured = read_table(TABLE).get(family(capability), {}).get(shape_class(kind, rows, columns, length))
    if measured == TWO_PASS:
        return None
    if measured is not None and (tile := Tile(*map(int, measured.split()))) in tiles:
        return fits_card(tile, capability)

    # The most worth, then the largest, of those no wider than the output that leave no multiprocessor idle.
    def fills(tile: Tile) -> bool:
        return suits(tile, columns) and -(-rows // tile.rows) * -(-columns // tile.columns) >= BUSY

    return fits_card(max(filter(fills, tiles), key=worth, default=tiles[-1]), capability)


@cache
def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Measured choices: family -> class of shapes -> tile as "rows columns depth warps stages", or TWO_PASS."""
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass
class Launch:
    """A kernel with its grid and arguments: `run` starts it; a test compiles it and a tuner times it instead."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int = 1

    def run(self) -> None:
        """Start the kernel on the device of its arguments and on the current stream there."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
