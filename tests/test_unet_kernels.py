"""The Triton blocks against the same blocks in plain PyTorch, both measured against float64.

On a CUDA machine the kernels run for real. Elsewhere `test_kernels_in_the_interpreter` runs this file once more in a process
of its own with Triton's interpreter, because the switch works only before Triton is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from guarded import guard_memory
from torch import Tensor, nn

from dydiff.backends import ON_GPU, apply_backend
from dydiff.diffusion.edm import Denoiser
from dydiff.errors import DydiffError
from dydiff.kernels import unet_reference
from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.unet import ConvBlock, ResidualBlock, UNet

triton = pytest.importorskip("triton")
import interpreter  # noqa: E402
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, interpret_again, on_kernels  # noqa: E402
from kernel_checks import assert_as_good_as_pytorch, draw, rounded, rows_of, seeded  # noqa: E402

from dydiff.kernels import fused_block, launch, unet_triton, winograd_triton  # noqa: E402
from dydiff.kernels.unet_cudnn import CudnnBlocks  # noqa: E402
from dydiff.kernels.unet_winograd import Output, WinogradBlocks  # noqa: E402

CAPABILITIES = [80, 90] if INTERPRETED else [None]  # pointers, descriptors; or what the card has
BACKENDS = {
    "cudnn": lambda dtype=torch.float16, kernel_size=5, capability=None: CudnnBlocks(dtype),  # the same on every card
    "triton-a": unet_triton.FusedBlocks,
    "triton-b": unet_triton.TwoPassBlocks,
    "triton-c": lambda dtype=torch.float16, kernel_size=5, capability=None: WinogradBlocks(dtype, capability),
}
A_SAMPLE_A_PROGRAM = "cudnn", "triton-c"  # or a few of them; the same code for all capabilities
# Both precisions; where there is no card to decide, one each with the code for A100s and for H100s.
PRECISIONS = [(torch.float16, CAPABILITIES[0]), (torch.bfloat16, CAPABILITIES[-1])]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN, so that an element which a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def prepared_interpreter(monkeypatch):
    if INTERPRETED:
        interpreter.prepare(monkeypatch)


@in_the_interpreter
def test_kernels_in_the_interpreter(tmp_path):
    interpret_again(__file__, tmp_path)


@pytest.mark.skipif(INTERPRETED, reason="memory is guarded already")
@pytest.mark.parametrize(("end", "inside", "beyond"), [("high", 63, 64), ("low", 0, -1)])
def test_one_byte_beyond_guarded_memory_crashes(end, inside, beyond, tmp_path):
    environment = guard_memory(tmp_path, end)
    if not environment:
        pytest.skip("memory is guarded on Linux, with a C compiler")
    code = "import ctypes, torch; x = torch.ones(16)"  # 64 bytes
    code += "".join(f"; print(ctypes.string_at(x.data_ptr() + {place}, 1), flush=True)" for place in (inside, beyond))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and done.returncode == -signal.SIGSEGV


def with_backends(shapes: list[tuple], enough: int) -> list[tuple[tuple, str]]:
    """Each shape, whose last number is that of taps, with each backend that is made for it: Winograd's is for five.

    Where a program has one sample, and the interpreter takes 40 ms for one, so many samples are `enough`.
    """
    fitting = [(shape, backend) for shape in shapes for backend in BACKENDS if backend != "triton-c" or shape[-1] == 5]
    if not INTERPRETED:
        return fitting
    fewer = {shape: (min(shape[0], enough), *shape[1:]) for shape in shapes}
    return [(fewer[shape] if backend in A_SAMPLE_A_PROGRAM else shape, backend) for shape, backend in fitting]


# B, L, channels of x, of skip (0: none), C_out, taps
BLOCKS = [
    (3, 25, 128, 128, 64, 5),  # the default network's lengths, samples cut by tiles
    (2, 100, 16, 0, 128, 5),  # fills one tile and a bit; an unaligned first convolution
    (7, 1, 8, 0, 8, 5),  # one channel a group, one position
    (5, 13, 24, 24, 48, 5),  # groups that are no power of two, and the identity as residual
    (2, 50, 64, 0, 64, 3),
    (1, 256, 16, 0, 16, 7),
    (19, 4, 32, 0, 96, 5),  # many samples a tile
]


def with_precisions(cases: list[tuple[tuple, str]]) -> list[tuple]:
    """Each case in both precisions; interpreted, a backend whose code is the same on every card has the second one once."""
    chosen, seen = [], set()
    for shape, backend in cases:
        both = not INTERPRETED or backend not in A_SAMPLE_A_PROGRAM or backend not in seen
        seen.add(backend)
        chosen += [(shape, backend, *precision) for precision in PRECISIONS[: 2 if both else 1]]
    return chosen


@on_kernels
@pytest.mark.parametrize(("shape", "backend", "dtype", "capability"), with_precisions(with_backends(BLOCKS, enough=2)))
def test_residual_block(shape, backend, dtype, capability):
    batch, length, width, skip_width, columns, taps = shape
    block = seeded(ResidualBlock, width + skip_width, columns, 8, taps)
    x, skip = rounded(draw(batch, length, width), dtype), rounded(draw(batch, length, skip_width, seed=1), dtype)
    time_bias = draw(columns, seed=2)

    def compute(blocks):
        entered = blocks.enter(skip) if skip_width else None
        return blocks.residual_block(blocks.enter(x), entered, blocks.pack(block.state_dict()), time_bias)

    assert_as_good_as_pytorch(compute, dtype, BACKENDS[backend](dtype, taps, capability))


@on_kernels
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tile", launch.TILES["sm_90"]["conv"], ids=lambda tile: "x".join(map(str, tile)))
def test_every_tile_of_the_convolution(tile, capability, monkeypatch):
    """A tile that the table's rule would not choose for a shape this small: a few rows more than it has, and half its columns."""
    monkeypatch.setitem(launch.TILES["sm_90"], "conv", [tile])
    monkeypatch.setitem(launch.TILES["sm_80"], "conv", [tile])
    block, x = seeded(ResidualBlock, 64, 160, 8, 5), rounded(draw(tile.rows // 25 + 1, 25, 64), torch.float16)

    def compute(blocks):
        return blocks.residual_block(blocks.enter(x), None, blocks.pack(block.state_dict()), draw(160, seed=2))

    assert_as_good_as_pytorch(compute, torch.float16, unet_triton.TwoPassBlocks(capability=capability))


@on_kernels
@pytest.mark.parametrize(("length", "channels"), [(25, 64), (13, 24), (4, 8)])
def test_points_are_those_of_the_rows(length, channels, monkeypatch):
    """Whether a block's last kernel makes them, which has rows of its tile in float32, or another one from its rows later.

    And whether a program has one sample, or as many as fit: three of 25 positions, two of 13, four of 4.
    """
    blocks = WinogradBlocks()
    packed, time_bias = blocks.pack(seeded(ResidualBlock, channels, channels, 8, 5).state_dict()), draw(channels, seed=1)
    x = draw(4, length, channels)

    def run() -> Output:
        return blocks.residual_block(blocks.enter(x), None, packed, time_bias)

    def assert_close(one: Tensor, other: Tensor) -> None:
        assert one.shape == other.shape and one.isfinite().all()
        assert (one - other).abs().max() <= 2 * torch.finfo(torch.float16).eps * other.abs().max()

    one, other = run(), run()
    blocks.rows(other)
    assert other.points is None
    points = blocks.points(one)
    assert_close(points, blocks.points(other))
    assert torch.equal(one.rows.rows, other.rows.rows) and points.shape == (10, 4 * -(-length // 5), channels)
    monkeypatch.setattr(winograd_triton, "BUSY", 1)
    shared = run()
    assert_close(blocks.points(shared), points)
    assert_close(shared.rows.rows, one.rows.rows)


@on_kernels
@pytest.mark.parametrize("tile", launch.TILES["sm_90"]["block"], ids=lambda tile: "x".join(map(str, tile)))
def test_every_tile_of_the_fused_block(tile, monkeypatch):
    """One sample more than a tile holds."""
    length = {256: 50, 128: 25, 64: 20}[tile.rows]
    monkeypatch.setitem(launch.TILES["sm_90"], "block", [tile])
    monkeypatch.setitem(launch.TILES["sm_80"], "block", [tile])
    columns = 256 if tile.columns == 128 else 64
    batch = tile.rows // length + 1
    assert fused_block.worth(tile, length, columns) > 0.9
    block, x = seeded(ResidualBlock, 64, columns, 8, 5), rounded(draw(batch, length, 64), torch.float16)

    def compute(blocks):
        return blocks.residual_block(blocks.enter(x), None, blocks.pack(block.state_dict()), draw(columns, seed=2))

    assert_as_good_as_pytorch(compute, torch.float16, unet_triton.FusedBlocks(capability=CAPABILITIES[-1]))


@on_kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_far_from_zero(backend):
    """A mean thirty deviations away is no harm: nothing is computed as a difference of squares."""
    block, x = seeded(ConvBlock, 64, 64, 5), rounded(draw(3, 25, 64), torch.float16)
    block.conv.bias.data += 30 * block.conv(x.float().transpose(1, 2)).std()
    final = seeded(nn.Conv1d, 64, 3, 1)

    def compute(blocks):
        return blocks.leave(blocks.enter(x), blocks.pack(block.state_dict()), blocks.pack(final.state_dict()))

    assert_as_good_as_pytorch(compute, torch.float16, BACKENDS[backend](), has_left=True)


@on_kernels
@pytest.mark.parametrize(("backend", "capability"), [*(("triton-b", each) for each in CAPABILITIES), ("triton-c", None)])
@pytest.mark.parametrize("shape", [(2, 100, 128), (2, 2, 8), (5, 13, 24)])  # B, L, C
def test_resampling(shape, backend, capability):
    x, channels = rounded(draw(*shape), torch.float16), shape[2]
    down, up = seeded(nn.Conv1d, channels, channels, 3, 2, 1), seeded(nn.ConvTranspose1d, channels, channels, 4, 2, 1)
    blocks = BACKENDS[backend](capability=capability)
    for name, layer in (("downsample", down), ("upsample", up)):
        weights = layer.state_dict()

        def compute(blocks, name=name, weights=weights):
            return getattr(blocks, name)(blocks.enter(x), blocks.pack(weights))

        assert_as_good_as_pytorch(compute, torch.float16, blocks)


# B, H, D, dim, dim_mults, kernel_size
NETWORKS = [
    (2, 100, 14, 16, (1, 4, 8), 5),  # 25 positions at the bottom
    (3, 2, 1, 16, (1, 2), 5),  # one position at the bottom
    (1, 12, 25, 24, (2, 1), 3),  # a concatenation as wide as the block's output: its residual is the identity
]


@on_kernels
@pytest.mark.parametrize(("shape", "backend"), with_backends(NETWORKS, enough=1))
def test_whole_network(shape, backend):
    batch, horizon, data_dim, dim, mults, taps = shape
    dtype, capability = PRECISIONS[backend == "triton-b"]  # the blocks' test has all combinations
    unet = seeded(UNet, data_dim, horizon, dim, mults, taps)
    x, label = draw(batch, horizon, data_dim), torch.tensor([0.3], device=DEVICE)
    exact = deepcopy(unet).double()(x.double(), label.double())

    def error(blocks) -> Tensor:
        fused = FusedUNet(unet, blocks)
        y = fused(x, fused.time_table(label)[0])
        assert y.shape == exact.shape and y.dtype == torch.float32 and y.is_contiguous()
        return (y - exact).abs().max()

    assert error(BACKENDS[backend](dtype, taps, capability)) <= 2 * error(unet_reference.ReferenceBlocks(dtype))


@on_kernels
def test_backends_by_name():
    classes = CudnnBlocks, unet_triton.FusedBlocks, unet_triton.TwoPassBlocks, WinogradBlocks
    denoiser = Denoiser(UNet(3, 8, 8, (1, 2), kernel_size=5), 2).to(DEVICE)
    for backend, kind in zip(ON_GPU, classes, strict=True):
        blocks = apply_backend(denoiser, backend).unet.blocks
        assert type(blocks) is kind and blocks.dtype == torch.float16


@on_kernels
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_is_the_same_and_nothing_is_nothing(backend):
    blocks = BACKENDS[backend]()
    packed, time_bias = blocks.pack(seeded(ResidualBlock, 64, 128, 8, 5).state_dict()), draw(128, seed=1)

    def run(x: Tensor) -> Tensor:
        return rows_of(blocks.residual_block(blocks.enter(x), None, packed, time_bias), blocks)

    x = draw(2 if INTERPRETED else 7, 25, 64)  # the interpreter has but one order of its programs
    assert torch.equal(run(x), run(x))
    assert run(x[:0]).shape == ((0, 25, 128) if backend == "cudnn" else (2, 128))  # one gap


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_can_be_captured(backend):
    fused = FusedUNet(seeded(UNet, 14, 100, 32, (1, 4, 8)), BACKENDS[backend]())
    table = fused.time_table(torch.tensor([0.3], device=DEVICE))[0]
    x = draw(5, 100, 14)
    eager = fused(x, table)  # compiles the kernels and splits the weights of concatenated inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(x, table)
    x.copy_(draw(5, 100, 14, seed=1))
    graph.replay()
    assert torch.equal(captured, fused(x, table)) and not torch.equal(captured, eager)


@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_cudnn_repeats_itself_and_leaves_no_trace(before, monkeypatch):
    """Whatever the user has set: algorithms that repeat themselves, chosen without a race."""
    settings, seen, convolve = torch.backends.cudnn, [], torch.nn.functional.conv2d
    for name, value in zip(("deterministic", "benchmark"), before, strict=True):
        monkeypatch.setattr(settings, name, value)

    def watched(*arguments, **options):
        seen.append((settings.deterministic, settings.benchmark))
        return convolve(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    blocks = CudnnBlocks(torch.bfloat16, execute=lambda launch: None)
    packed = blocks.pack(ResidualBlock(8, 16, 8, 5).state_dict())
    blocks.residual_block(blocks.enter(torch.randn(2, 7, 8)), None, packed, torch.zeros(16))
    assert seen == [(True, False)] * 2 and (settings.deterministic, settings.benchmark) == before


def test_packed_weights_are_a_copy():
    block = ResidualBlock(8, 16, 8, 5)
    packed = unet_triton.TwoPassBlocks().pack(block.half().state_dict())
    first = packed.block1.convolution
    for values, parameter in ((first.phases, block.block1.conv.weight), (packed.block1.scale, block.block1.norm.weight)):
        before = values.clone()
        parameter.data.add_(1)
        assert torch.equal(values, before)


def test_misuse_is_told():
    with pytest.raises(DydiffError, match="float16 or bfloat16, not torch.float32"):
        unet_triton.TwoPassBlocks(torch.float32)
    with pytest.raises(DydiffError, match="kernel_size=7"):
        FusedUNet(UNet(3, 8, 16, (1, 2), kernel_size=7), unet_triton.FusedBlocks())
    if not INTERPRETED:
        assert "NVIDIA GPU" in unet_triton.why_unavailable("cpu")
