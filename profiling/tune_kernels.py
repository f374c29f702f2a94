"""Measures every tile of launch.py on this card and keeps the fastest for each class of shapes.

`python profiling/tune_kernels.py` runs the default U-Net at a full and at a small batch, times each convolution with each tile
that may serve it, and each block as one kernel and in two passes; it writes kernels/launch_table.json (or --save), where entries of
other families of cards stay.
Compiling all variants takes minutes the first time. Nothing else ever tunes: without a table, launch.py's rule decides.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from dydiff.checkpoint import write_atomically
from dydiff.errors import DydiffError
from dydiff.kernels.convolution import Form, convolve
from dydiff.kernels.fused_block import fuse_block, worth
from dydiff.kernels.launch import TABLE, TILES, TWO_PASS, Launch, Tile, family, fits_card, read_table, shape_class, suits
from dydiff.kernels.layout import Activation
from dydiff.kernels.packing import ConvBlock, Convolution, Residual
from dydiff.kernels.unet_triton import TwoPassBlocks, why_unavailable
from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.unet import UNet
from dydiff.options import positive

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from command_line import HORIZON, check_network, documented_parser, output_file, tells_errors  # noqa: E402 - no package

# Class of shapes -> tile, or TWO_PASS -> milliseconds of each layer of that class that it may serve.
Times = dict[str, dict[Tile | str, list[float]]]


class TimedBlocks(TwoPassBlocks):
    """The two-pass backend, which on its way times every tile for every convolution and for every fused block."""

    def __init__(
        self,
        measure: Callable[[Launch], float],
        capability: int | None = None,
        execute: Callable[[Launch], None] = Launch.run,
    ):
        super().__init__(capability=capability, execute=execute)
        self.measure = measure
        self.times: Times = defaultdict(lambda: defaultdict(list))

    def conv_block(
        self,
        sources: tuple[Activation, ...],
        block: ConvBlock,
        time: Tensor | None = None,
        residual: Residual | None = None,
    ) -> Activation:
        self.time_convolution(sources, block.convolution, Form(statistics=True))
        x, columns, capability = sources[0], len(block.scale), self.capability_of(sources[0])
        name, out = shape_class("block", x.batch * x.length, columns, x.length), x.empty(x.length, columns)
        for tile in TILES[family(capability)]["block"]:
            if worth(tile, x.length, columns):
                launch = fuse_block(sources, block, out, capability, time, residual, fits_card(tile, capability))
                self.times[name][tile].append(self.measure(launch))
        launches: list[Launch] = []

        def execute(launch: Launch) -> None:
            launches.append(launch)
            self.execute(launch)

        result = TwoPassBlocks(self.dtype, 2 * self.gap + 1, capability, execute).conv_block(sources, block, time, residual)
        if name in self.times:  # with the tiles that are chosen now
            self.times[name][TWO_PASS].append(sum(map(self.measure, launches)))
        return result

    def convolve(self, sources: tuple[Activation, ...], convolution: Convolution, form: Form) -> Tensor | Activation:
        self.time_convolution(sources, convolution, form)
        return super().convolve(sources, convolution, form)

    def time_convolution(self, sources: tuple[Activation, ...], convolution: Convolution, form: Form) -> None:
        x, columns, capability = sources[0], len(convolution.bias), self.capability_of(sources[0])
        length = -(-x.length // form.stride)
        name = shape_class("conv", x.batch * length, columns, length)
        for tile in TILES[family(capability)]["conv"]:
            if suits(tile, columns):
                launch, _, _ = convolve(sources, convolution, capability, form, fits_card(tile, capability))
                self.times[name][tile].append(self.measure(launch))


def measure(launch: Launch) -> float:
    """Median milliseconds with a cold L2 cache."""
    return triton.testing.do_bench(launch.run, warmup=5, rep=20, return_mode="median")


def fastest(times: Times) -> dict[str, str]:
    """The quickest tile of every class of shapes, as the table spells it; of those that serve all layers of the class."""
    best = {}
    for name, tiles in sorted(times.items()):
        layers = max(map(len, tiles.values()))
        best[name] = min((tile for tile in tiles if len(tiles[tile]) == layers), key=lambda tile: sum(tiles[tile]))
    return {name: tile if tile == TWO_PASS else " ".join(map(str, tile)) for name, tile in best.items()}


def save(choices: dict[str, str], name: str, path: Path) -> None:
    """Write the choices of one family of cards into the table."""
    table = {**read_table(path), name: choices}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(table, indent=2) + "\n"))
    read_table.cache_clear()


@tells_errors
def main() -> None:
    parser = documented_parser(__doc__)
    sizes = "batch sizes to measure (default: 2048 32)"
    parser.add_argument("--batch", type=positive(int), nargs="+", default=[2048, 32], help=sizes)
    parser.add_argument("--horizon", type=positive(int), default=HORIZON)
    parser.add_argument("--save", type=output_file, default=TABLE, help="where to write the table (default: where it is read)")
    arguments = parser.parse_args()
    check_network(parser, arguments)
    try:
        read_table(arguments.save)  # its other entries stay
    except ValueError as error:
        raise DydiffError(f"'{arguments.save}' is no table of launches ({error}); name another file with --save.") from error
    if reason := why_unavailable("cuda"):
        raise DydiffError(reason)

    blocks = TimedBlocks(measure)
    unet = UNet(14, arguments.horizon).cuda().eval()
    fused = FusedUNet(unet, blocks)
    time_biases = fused.time_table(torch.zeros(1, device="cuda"))[0]
    for batch in arguments.batch:
        fused(torch.randn(batch, arguments.horizon, 14, device="cuda"), time_biases)
    for name, tiles in sorted(blocks.times.items()):
        print(name)
        for tile, milliseconds in sorted(tiles.items(), key=lambda item: sum(item[1])):
            print(f"    {tile}  {sum(milliseconds):.3f} ms in {len(milliseconds)} layers")
    major, minor = torch.cuda.get_device_capability()
    save(fastest(blocks.times), family(10 * major + minor), arguments.save)
    print(f"{torch.cuda.get_device_name()}: wrote {arguments.save}")


if __name__ == "__main__":
    sys.exit(main())
