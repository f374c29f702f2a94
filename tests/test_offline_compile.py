"""Every kernel configuration that the launcher can choose, compiled for an A100 and an H100 without either.

The launches are recorded from the network itself, run on tensors without storage, and compiled by Triton's own entry point:
types, alignment and options are those of a real call.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.unet import UNet

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from dydiff.kernels import adam, finish, fused_block, launch, unet_cudnn, unet_triton, unet_winograd  # noqa: E402
from dydiff.kernels.training_cpu import AdamCoefficients  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "profiling"))
import tune_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton is set to interpret, not to compile")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# H, D, dim, dim_mults; the default network, and one whose widths no tile divides and whose groups are no power of two
NETWORKS = {"default": (100, 14, 128, (1, 4, 8)), "odd": (12, 3, 24, (1, 5))}
TILES = [(int(name[3:]), kind, tile) for name, kinds in launch.TILES.items() for kind in kinds for tile in kinds[kind]]


class Card:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_launch():
    """compile_launch(launch, capability) -> Triton's compiled kernel."""

    def compile_for(recorded: launch.Launch, capability: int):
        triton.runtime.driver.set_active(Card(capability))
        options = {"num_warps": recorded.warps, "num_stages": recorded.stages}
        return recorded.kernel.warmup(grid=recorded.grid, **recorded.arguments, **options)

    before = dict(vars(triton.runtime.driver))
    yield compile_for
    vars(triton.runtime.driver).update(before)


def record(
    blocks: type[unet_triton.TwoPassBlocks],
    capability: int,
    network: str,
    batch: int,
    dtype: torch.dtype = torch.float16,
) -> list[launch.Launch]:
    """All launches of one evaluation."""
    horizon, data_dim, dim, mults = NETWORKS[network]
    launches: list[launch.Launch] = []
    with torch.device("meta"):
        unet, x, label = UNet(data_dim, horizon, dim, mults), torch.empty(batch, horizon, data_dim), torch.empty(1)
    fused = FusedUNet(unet, blocks(dtype, capability=capability, execute=launches.append))
    fused(x, fused.time_table(label)[0])
    return launches


def variants(launches: list[launch.Launch]) -> list[launch.Launch]:
    """One launch for each combination of branches that changes the code much, with concatenated inputs where there are any.

    Of those the narrowest, whose groups are the most a tile holds.
    """
    chosen: dict[tuple, launch.Launch] = {}

    def concatenates(recorded: launch.Launch) -> bool:
        return bool(recorded.arguments.get("C2") or recorded.arguments.get("R2"))

    for recorded in sorted(launches, key=lambda one: (not concatenates(one), one.arguments["N"])):
        arguments = recorded.arguments
        branches = [bool(arguments.get(name)) for name in ("R1", "PART", "GAP", "X_TMA")]
        branches += [arguments.get("residual") is None, arguments.get("STRIDE"), arguments["ROWS"], arguments["COLUMNS"]]
        if "C1" in arguments:
            branches.append(arguments["C1"] * arguments["TAPS"] % arguments["DEPTH"] == 0)  # without masks
        chosen.setdefault((recorded.kernel.__name__, *branches), recorded)
    return list(chosen.values())


def spilled_bytes(kernel) -> int:
    """What the machine code keeps in local memory, from NVIDIA's own disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


def assert_sound(kernel, recorded: launch.Launch, capability: int) -> None:
    assert spilled_bytes(kernel) == 0
    assert kernel.metadata.shared <= SHARED_LIMIT[capability]
    if kernel.name == "normalisation_kernel":
        return
    code, arguments = kernel.asm["ptx"], recorded.arguments
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in code
    if arguments["TAPS"] * arguments["C1"] >= recorded.stages * arguments["DEPTH"]:  # else there is no loop to speak of
        copies = code.count("cp.async.cg") + code.count("cp.async.bulk.tensor")
        assert copies >= 2 * recorded.stages  # both operands, in the loop and while the stages are first filled
        if capability == 90 and arguments["N"] >= arguments["COLUMNS"]:  # a descriptor's box fits into the matrix
            assert "cp.async.bulk.tensor" in code


@pytest.mark.parametrize(("capability", "kind", "tile"), TILES, ids=lambda value: repr(value).removeprefix("Tile"))
def test_tile_compiles_well(capability, kind, tile, compile_launch, monkeypatch):
    """Each tile in the default network at a full batch, wherever the launcher may choose it."""
    monkeypatch.setitem(launch.TILES[f"sm_{capability}"], kind, [tile])
    blocks = unet_triton.TwoPassBlocks if kind == "conv" else unet_triton.FusedBlocks
    name = "convolution_kernel" if kind == "conv" else "block_kernel"
    launches = [one for one in record(blocks, capability, "default", 2048) if one.kernel.__name__ == name]
    launches = [one for one in launches if launch.suits(tile, one.arguments["N"])]
    assert launches
    for recorded in variants(launches):
        assert (recorded.warps, recorded.stages) == (tile.warps, tile.stages)
        assert_sound(compile_launch(recorded, capability), recorded, capability)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_normalisation_and_odd_widths_compile_well(capability, compile_launch):
    launches = record(unet_triton.TwoPassBlocks, capability, "default", 2048)
    launches = [one for one in launches if one.kernel.__name__ == "normalisation_kernel"]
    for recorded in variants(launches + record(unet_triton.FusedBlocks, capability, "odd", 5, torch.bfloat16)):
        assert_sound(compile_launch(recorded, capability), recorded, capability)


# Backend, horizon, samples: few of them share programs of triton-c otherwise. Of 32 positions a thread holds what it does of 100.
HELD = [("triton-c", 100, 2048), ("triton-c", 256, 2048), ("triton-c", 100, 16), ("cudnn", 100, 2048), ("cudnn", 256, 2048)]


@pytest.mark.parametrize(("backend", "horizon", "batch"), HELD)
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_what_is_around_products_compiles_well(capability, backend, horizon, batch, compile_launch):
    """Every launch of an evaluation: nothing spilled, and 16 bytes a load and store where the tile is large enough."""
    launches: list[launch.Launch] = []
    with torch.device("meta"):
        unet, x, label = UNet(14, horizon), torch.empty(batch, horizon, 14), torch.empty(1)
    if backend == "cudnn":
        blocks = unet_cudnn.CudnnBlocks(execute=launches.append)
    else:
        blocks = unet_winograd.WinogradBlocks(capability=capability, execute=launches.append)
    fused = FusedUNet(unet, blocks)
    fused(x, fused.time_table(label)[0])
    accesses = {"input_kernel": (9, 10), "output_kernel": (10, 5), "finish_kernel": (1, 1)}  # loads and stores of a tile
    launches = [one for one in launches if one.kernel.__name__ in accesses]

    def kind(recorded: launch.Launch) -> tuple:
        return recorded.kernel.__name__, *(value is None for value in recorded.arguments.values())

    def size(recorded: launch.Launch) -> tuple:
        return tuple(recorded.arguments.get(name) for name in ("TILES", "ROWS", "COLUMNS", "GROUP"))

    # Every kind once, and of every size those that hold most in registers
    heavy = [one for one in launches if one.arguments.get("more") is not None or one.arguments.get("residual") is not None]
    chosen = {kind(one): one for one in launches if batch == 2048} | {(kind(one), size(one)): one for one in heavy}
    for recorded in {(kind(one), size(one)): one for one in chosen.values()}.values():
        kernel = compile_launch(recorded, capability)
        assert spilled_bytes(kernel) == 0 and kernel.metadata.shared <= SHARED_LIMIT[capability]
        tile = [recorded.arguments[name] for name in ("TILES", "ROWS", "COLUMNS") if name in recorded.arguments]
        pieces = math.prod(tile) // (256 * recorded.warps)  # of 16 bytes that a thread has of a tile
        code, (loads, stores) = kernel.asm["ptx"], accesses[recorded.kernel.__name__]
        if recorded.kernel.__name__ == "output_kernel" and recorded.arguments["points"] is not None:
            # Rows, then what other threads wrote of them, and only then the points
            rows, after = code.rsplit("bar.sync", 1)
            assert (rows.count("st.global.v4.b32"), after.count("st.global.v4.b32")) == (5 * pieces, 10 * pieces)
            assert "ld.global" in after
            loads, stores = loads + 4, stores + 10
        if pieces:
            assert code.count("ld.global.v4.b32") >= loads * pieces and code.count("st.global.v4.b32") == stores * pieces


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_training_compiles_well(capability, dtype, compile_launch, monkeypatch):
    """What follows a convolution in training, and its gradient, for the default network's blocks at horizons of 100 and 256."""
    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch.Launch, "run", lambda one: launches.append(one))
    for length, channels in ((100, 128), (50, 512), (25, 1024), (256, 128), (128, 512), (64, 1024)):
        with torch.device("meta"):
            x, time = torch.empty(8, length, channels, dtype=dtype, requires_grad=True), torch.empty(8, channels)
            parameters = [torch.empty(channels, requires_grad=True) for _ in range(3)]
        finish.finish_block(x, *parameters, time, x).sum().backward()
    assert [one.kernel.__name__ for one in launches] == 6 * ["finish_kernel", "finish_backward_kernel"]
    for recorded in launches:
        kernel = compile_launch(recorded, capability)
        assert spilled_bytes(kernel) == 0 and kernel.metadata.shared <= SHARED_LIMIT[capability]
        assert kernel.asm["ptx"].count("ld.global.v4.b32") >= (2 if dtype == torch.bfloat16 else 4)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_the_update_compiles_well(capability, low, compile_launch):
    """16 bytes a load and store."""
    rows = [torch.empty(3 * adam.BLOCK, device="meta") for _ in range(6)]
    rows[4:] = (row.bfloat16() for row in rows[4:]) if low else (rows[4], None)
    recorded = adam.adam_average(*rows, AdamCoefficients(1e-3, 0.9, 0.999, 1e-8, 2, 0.1, 1e5))
    kernel = compile_launch(recorded, capability)
    assert spilled_bytes(kernel) == 0 and recorded.grid == (3,)
    in_float32, in_16_bit = (adam.BLOCK // (count * 32 * recorded.warps) for count in (4, 8))
    code = kernel.asm["ptx"]
    assert code.count("ld.global.v4.b32") == 4 * in_float32 + (in_16_bit if low else in_float32)
    assert code.count("st.global.v4.b32") == 4 * in_float32 + (in_16_bit if low else 0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("blocks", [unet_triton.TwoPassBlocks, unet_triton.FusedBlocks])
def test_no_box_of_a_descriptor_is_larger_than_its_tensor(network, blocks):
    for batch in (1, 5, 64):
        for recorded in record(blocks, 90, network, batch):
            for argument in recorded.arguments.values():
                if isinstance(argument, TensorDescriptor):
                    assert all(box <= size for box, size in zip(argument.block_shape, argument.shape, strict=True))


def test_smaller_cards_get_fewer_stages():
    """Those of compute capability 8.6, 8.9 and 12.0 have 99 KiB of shared memory for a block."""
    for kind in launch.TILES["sm_80"].values():
        for tile in kind:
            fitted = launch.fits_card(tile, 89)
            assert fitted.stage_bytes * fitted.stages <= 99 * 1024
            assert 1 < fitted.stages <= tile.stages


def test_measured_choices_are_used(tmp_path, monkeypatch):
    tile = launch.TILES["sm_90"]["conv"][2]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"sm_90": {launch.shape_class("conv", 51200, 1024, 25): " ".join(map(str, tile))}}))
    monkeypatch.setattr(launch, "TABLE", table)
    assert launch.choose("conv", 90, 51200, 1024, 25) == tile
    assert launch.choose("conv", 80, 51200, 1024, 25) in launch.TILES["sm_80"]["conv"]
    assert launch.choose("conv", 90, 400, 1024, 25) != tile


def test_tuner_writes_what_was_fastest(tmp_path, monkeypatch):
    """With a stopwatch that likes tiles of few rows, and no blocks of 50 positions; the launches have no storage."""

    def stopwatch(one: launch.Launch) -> float:
        slow = one.kernel.__name__ == "block_kernel" and one.arguments["length"] == 50
        return 1e3 if slow else one.arguments.get("ROWS", 1)

    with torch.device("meta"):
        unet, x, label = UNet(14, 100), torch.empty(2048, 100, 14), torch.empty(1)
    blocks = tune_kernels.TimedBlocks(stopwatch, capability=90, execute=lambda one: None)
    fused = FusedUNet(unet, blocks)
    fused(x, fused.time_table(label)[0])
    assert all(len(set(map(len, tiles.values()))) == 1 for tiles in blocks.times.values()), "sums over the same layers"
    few, all_layers = launch.TILES["sm_90"]["block"][:2]
    assert tune_kernels.fastest({"any": {few: [1.0], all_layers: [2.0, 2.0]}}) == {"any": " ".join(map(str, all_layers))}
    table = tmp_path / "table.json"
    tune_kernels.save({"conv columns 32 many": "64 32 64 4 5"}, "sm_80", table)
    tune_kernels.save(tune_kernels.fastest(blocks.times), "sm_90", table)
    assert set(json.loads(table.read_text())) == {"sm_80", "sm_90"}
    monkeypatch.setattr(launch, "TABLE", table)
    assert launch.choose("conv", 90, 2048 * 25, 1024, 25).rows == 64
    assert launch.choose("conv", 80, 2048 * 100, 14, 100).columns == 32
    assert launch.choose("block", 90, 2048 * 50, 512, 50, lambda tile: fused_block.worth(tile, 50, 512)) is None
    assert launch.choose("block", 90, 2048 * 25, 1024, 25, lambda tile: fused_block.worth(tile, 25, 1024)).rows == 64
