"""Which limit each block of the diffusion network runs into: its rate over its arithmetic intensity, under the measured roofs.

    python benchmarks/roofline.py --plot roofline.png [--json FILE] [--batch 32] [--horizon 100] [--variants reference,bf16]

Evaluates the full-size network block by block, several times, and takes the median of each. FLOPs are those of direct
convolutions, so that Winograd's may pass the roof; bytes are the least that a block moves when it is one kernel: its inputs, its
outputs and its weights once, in the variant's dtype. The roofs are large matrix products and copies, measured in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import HORIZON, add_network_options, check_network, describe_size, make_timing_parser, some_of, tells_errors
from harness import BenchmarkError, Failures, append_lines, measure_matrix_rate, time_call
from machine import describe_machine
from torch import nn

from dydiff.backends import ON_GPU, apply_backend
from dydiff.device import find_device, has_fast_bf16
from dydiff.diffusion.edm import Denoiser
from dydiff.kernels.unet_reference import ReferenceBlocks
from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.unet import ResidualBlock, UNet
from dydiff.options import positive

OBSERVATION_DIM, WIDTH = 11, 14  # hopper
DTYPES = {"reference": "float32", "winograd": "float32", "bf16": "bfloat16"} | dict.fromkeys(ON_GPU, "float16")
BANDWIDTH_BYTES = 2**28
WARM_UP, LEAST = 2, 5
LABELS = {"residual_block": "residual blocks", "downsample": "downsampling", "upsample": "upsampling", "leave": "end"}


@dataclass
class Block:
    """One call of a blocks backend during an evaluation."""

    kind: str  # the backend's method
    flops: float
    bytes: float
    seconds: list[float] = field(default_factory=list)

    def record(self, place: int) -> dict[str, Any]:
        """What --json says of it."""
        median = statistics.median(self.seconds)
        figures = {"median_s": median, "tflops": self.flops / median / 1e12, "intensity": self.flops / self.bytes}
        return {"place": place, "kind": self.kind, **figures, "gflop": self.flops / 1e9, "repeats": len(self.seconds)}


class TimedBlocks:
    """A blocks backend that records how long each of its calls took, one list of `Block.seconds` for each place in the network."""

    def __init__(self, blocks: Any, costs: Sequence[Block]):
        self.blocks = blocks
        self.costs = costs
        self.place = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.blocks, name)
        if name not in LABELS:
            return method

        def timed(*arguments: Any) -> Any:
            seconds, output = time_call(lambda: method(*arguments))
            block = self.costs[self.place]
            if block.kind != name:
                raise BenchmarkError(f"The network calls '{name}' where '{block.kind}' was counted.")
            block.seconds.append(seconds)
            self.place = (self.place + 1) % len(self.costs)
            return output

        return timed


def count_costs(unet: UNet, batch: int, horizon: int, itemsize: int) -> list[Block]:
    """FLOPs and bytes of every block, in the order in which they run."""
    blocks, length = [], horizon

    def add(kind: str, first: nn.Module, last: nn.Module, weights: int, rows_in: int, rows_out: int) -> None:
        # A transposed convolution multiplies each row that comes in by its weights, the others each row that goes out.
        flops = 2 * batch * min(rows_in, rows_out) * weights
        activations = batch * (rows_in * first.in_channels + rows_out * last.out_channels)
        blocks.append(Block(kind, flops, itemsize * (weights + activations)))

    def add_pair(pair: Sequence[ResidualBlock]) -> None:
        for block in pair:
            convolutions = [layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Conv1d)]
            add("residual_block", block.block1.conv, block.block2.conv, sum(convolutions), length, length)

    for level, pair in enumerate(unet.down):
        add_pair(pair)
        if level < len(unet.downsample):
            layer = unet.downsample[level]
            add("downsample", layer, layer, layer.weight.numel(), length, length // 2)
            length //= 2
    add_pair(unet.middle)
    for pair, layer in zip(unet.up, unet.upsample, strict=True):
        add_pair(pair)
        add("upsample", layer, layer, layer.weight.numel(), length, 2 * length)
        length *= 2
    first, last = unet.final_block.conv, unet.final_conv
    add("leave", first, last, first.weight.numel() + last.weight.numel(), length, length)
    return blocks


@torch.no_grad()
def measure_blocks(variant: str, unet: UNet, batch: int, horizon: int, device: str, seconds: float) -> list[Block]:
    """Every block's costs and times in one variant, over about so many seconds but `LEAST` evaluations.

    Raises:
        DydiffError: the backend cannot run here.
    """
    costs = count_costs(unet, batch, horizon, getattr(torch, DTYPES[variant]).itemsize)
    plain = ReferenceBlocks()
    blocks = plain if variant == "reference" else apply_backend(Denoiser(unet, OBSERVATION_DIM), variant).unet.blocks
    timed = TimedBlocks(blocks, costs)
    network = FusedUNet(unet, timed)
    biases = network.time_table(torch.zeros(1, device=device))[0]
    x = torch.randn(batch, horizon, WIDTH, generator=torch.Generator(device).manual_seed(0), device=device)
    for _ in range(WARM_UP):
        network(x, biases)
    end, evaluations = time.monotonic() + seconds, 0
    while evaluations < LEAST or time.monotonic() < end:
        network(x, biases)
        evaluations += 1
    for block in costs:
        del block.seconds[:WARM_UP]
    return costs


def measure_bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(BANDWIDTH_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    seconds = [time_call(lambda: target.copy_(source))[0] for _ in range(12)][2:]
    return 2 * BANDWIDTH_BYTES / statistics.median(seconds)


def draw(lines: Sequence[dict[str, Any]], rates: dict[str, float], bandwidth: float, title: str, path: Path) -> None:
    """The picture: a marker a block, as large as its share of the variant's time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    from dydiff.reports.plots import COLOURS, MARKERS

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ax = figure.subplots()
    reach = [1.0, 2 * max(line["intensity"] for line in lines)]
    for index, (dtype, rate) in enumerate(rates.items()):
        corner = rate / bandwidth
        style = {"color": "#222222", "linewidth": 1, "linestyle": ("-", "--", ":")[index % 3]}
        style["label"] = f"{dtype} products, {rate / 1e12:.3g} TFLOP/s"
        ax.plot([reach[0], corner, reach[1]], [reach[0] * bandwidth / 1e12, rate / 1e12, rate / 1e12], **style)
    totals: dict[str, float] = {}
    for line in lines:
        totals[line["variant"]] = totals.get(line["variant"], 0) + line["median_s"]
    for colour, variant in zip(COLOURS, totals, strict=False):
        for marker, (kind, label) in zip(MARKERS, LABELS.items(), strict=False):
            mine = [line for line in lines if line["variant"] == variant and line["kind"] == kind]
            sizes = [20 + 1500 * line["median_s"] / totals[variant] for line in mine]
            x, y = [line["intensity"] for line in mine], [line["tflops"] for line in mine]
            ax.scatter(x, y, sizes, color=colour, marker=marker, alpha=0.6, label=f"{variant}, {label}")
    ax.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="TFLOP/s, counted as direct convolutions")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_title(f"{title}; copies at {bandwidth / 1e9:.0f} GB/s", fontsize=9)
    ax.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=0.5)
    figure.savefig(path, dpi=150)


def show(variant: str, lines: Sequence[dict[str, Any]]) -> None:
    """Print a variant's time and rate, in all and by kind of block."""
    total, gflop = sum(line["median_s"] for line in lines), sum(line["gflop"] for line in lines)
    print(f"{variant}: {total * 1e3:.1f} ms in all, {gflop / total / 1e3:.3g} TFLOP/s")
    for kind, label in LABELS.items():
        mine = [line for line in lines if line["kind"] == kind]
        seconds, gflop = sum(line["median_s"] for line in mine), sum(line["gflop"] for line in mine)
        low, high = (choose(line["intensity"] for line in mine) for choose in (min, max))
        shares = f"{seconds / total:6.1%} of the time, {gflop / seconds / 1e3:6.3g} TFLOP/s"
        print(f"  {label:16s} {shares}, {low:.0f} to {high:.0f} FLOP a byte")


@tells_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_timing_parser(__doc__, "2 seconds a variant")
    add_network_options(parser)
    parser.add_argument("--variants", type=some_of(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--batch", type=positive(int), default=32)
    parser.add_argument("--horizon", type=positive(int), default=HORIZON)
    options = parser.parse_args(arguments)
    check_network(parser, options)
    device = find_device(options.device)
    batch, horizon = options.batch, options.horizon
    torch.manual_seed(0)
    unet = UNet(WIDTH, horizon, options.dim, options.dim_mults).to(device).eval().requires_grad_(False)
    machine, size = describe_machine(device), describe_size(options)
    print(", ".join([f"{name} {value}" for name, value in machine.items()] + [size] * bool(size)))
    on_cpu = ["bf16" if has_fast_bf16(torch.device(device)) else "winograd"]
    default = ["reference", *(on_cpu if device == "cpu" else ON_GPU)]
    lines, rates, failures = [], {}, Failures()
    bandwidth = measure_bandwidth(device)
    seconds = options.seconds or (2 if options.quick else 10)
    for variant in options.variants or default:
        with failures.attempt(variant):
            dtype = DTYPES[variant]
            blocks = measure_blocks(variant, unet, batch, horizon, device, seconds)
            if dtype not in rates:  # not before: where a variant cannot run, products of its dtype may take minutes
                rates[dtype] = measure_matrix_rate(dtype, device)
            about = {"case": "roofline", "variant": variant, "dtype": dtype, "batch": batch, "horizon": horizon, "note": size}
            mine = [about | block.record(place) for place, block in enumerate(blocks)]
            show(variant, mine)
            lines += mine
    roofs = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items())
    print(f"Roofs: {roofs}; copies {bandwidth / 1e9:.1f} GB/s")
    if options.json and lines:
        roofs = {"bandwidth": bandwidth, **{f"{dtype}_rate": rate for dtype, rate in rates.items()}}
        append_lines(options.json, [line | roofs | machine for line in lines])
    if options.plot and lines:
        title = ", ".join([machine["device"], f"batch {batch}, horizon {horizon}", *[size] * bool(size)])
        draw(lines, rates, bandwidth, title, options.plot)
    return failures.status()


if __name__ == "__main__":
    sys.exit(main())
