"""The CPU blocks in bfloat16 and float32 against float64: Winograd transforms, norm, activation, resampling, at odd shapes."""

import sys

import pytest
import torch

from dydiff.backends import ON_CPU, apply_backend
from dydiff.backends import choice as backend_choice
from dydiff.backends.choice import choose_backend, prepare_denoiser
from dydiff.diffusion.edm import Denoiser
from dydiff.errors import DydiffError
from dydiff.kernels import edm, matrix_cpu, native
from dydiff.kernels.unet_cpu import CpuBlocks
from dydiff.kernels.unet_reference import ReferenceBlocks
from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.unet import ResidualBlock, UNet

pytestmark = pytest.mark.skipif(bool(edm.why_unavailable("cpu")), reason="the compiled CPU unit is not built here")

# Winograd amplifies rounding (kernels/winograd.py says by how much); plain convolutions of the same dtype are the yardstick.
WINOGRAD_FACTOR = {torch.bfloat16: 3.0, torch.float32: 400.0}
DTYPES = pytest.mark.parametrize("dtype", WINOGRAD_FACTOR, ids=str)


def poisoned(*shape: int, dtype: torch.dtype) -> None:
    """Fill memory of that size with NaN and free it, so that an unwritten output shows."""
    del [torch.full(shape, float("nan"), dtype=dtype) for _ in range(4)][:]


def run_block(blocks, x, skip, weights, time_bias):
    """[B, C, L] in and out, whatever the backend's layout is."""
    channels_last = isinstance(blocks, CpuBlocks)
    enter = (lambda t: t.transpose(1, 2).to(blocks.dtype).contiguous()) if channels_last else (lambda t: t.to(blocks.dtype))
    y = blocks.residual_block(enter(x), None if skip is None else enter(skip), blocks.pack(weights), time_bias)
    return (y.transpose(1, 2) if channels_last else y).double()


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "length, channels, skip_channels, out_channels",
    [(1, 16, 0, 128), (2, 7, 0, 64), (5, 16, 0, 32), (25, 32, 32, 8), (50, 24, 8, 40), (13, 64, 0, 128), (7, 512, 0, 64)],
)  # norms over 16 elements and more: those over a few turn the sign of a rounding error into the result
def test_residual_block(batch, length, channels, skip_channels, out_channels, dtype):
    torch.manual_seed(0)
    block = ResidualBlock(channels + skip_channels, out_channels, 8, 5).double()
    weights = block.state_dict()
    x, time_bias = torch.randn(batch, channels, length).double() + 3, torch.randn(out_channels).double()
    skip = torch.randn(batch, skip_channels, length).double() if skip_channels else None
    exact = run_block(ReferenceBlocks(torch.float64), x, skip, weights, time_bias)
    plain = run_block(ReferenceBlocks(dtype), x, skip, weights, time_bias)
    poisoned(batch, length, max(channels + skip_channels, out_channels) * 6, dtype=dtype)
    fused = run_block(CpuBlocks(dtype), x, skip, weights, time_bias.float())
    assert torch.isfinite(fused).all()
    assert (fused - exact).abs().max() <= WINOGRAD_FACTOR[dtype] * (plain - exact).abs().max()


@DTYPES
def test_mish_at_its_ends(dtype):
    """Where e^x leaves the range of floats on either side."""
    torch.manual_seed(0)
    block = ResidualBlock(16, 32, 8, 5).double()
    for conv_block in (block.block1, block.block2):
        torch.nn.init.uniform_(conv_block.norm.weight, 50, 100)
    weights, x, time_bias = block.state_dict(), torch.randn(2, 16, 25).double(), torch.zeros(32).double()
    exact = run_block(ReferenceBlocks(torch.float64), x, None, weights, time_bias)
    plain = run_block(ReferenceBlocks(dtype), x, None, weights, time_bias)
    fused = run_block(CpuBlocks(dtype), x, None, weights, time_bias.float())
    assert exact.max() > 100 and torch.isfinite(fused).all()
    assert (fused - exact).norm() <= WINOGRAD_FACTOR[dtype] * (plain - exact).norm()


def insist_on(product: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert product.dtype == dtype and product.shape == exact.shape
    assert (product.double() - exact).abs().max() <= (torch.finfo(dtype).eps / 2 + 1e-6) * exact.abs().max()  # float32 sums


@DTYPES
@pytest.mark.parametrize("ordered", [True, False])
def test_constant_matrices(ordered, dtype, monkeypatch):
    if ordered and not matrix_cpu.can_order(dtype):
        pytest.skip("PyTorch cannot lay out matrices for oneDNN here")
    monkeypatch.setattr(matrix_cpu, "can_order", lambda dtype: ordered)
    generator = torch.Generator().manual_seed(0)
    for width in (32, 33):
        shapes = (3, 5, 70), (3, 70, width), (width,)
        rows, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        exact = rows.double() @ weight.double()
        one, many = matrix_cpu.ConstantMatrix(weight[0], bias, dtype), matrix_cpu.ConstantMatrices(weight, dtype)
        first = exact[0] + bias.double()
        weight.zero_()
        bias.zero_()
        insist_on(one.multiply(rows[0]), first, dtype)
        insist_on(torch.stack(list(many.multiply(rows))), exact, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("depth, columns", [(1, 1), (130, 31), (257, 96), (128, 64)])
def test_products_in_float32(depth, columns, threads, monkeypatch):
    """Every number of rows that a group of them may have, more than share a reading of the matrix, and memory that is not clean."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, depth, columns, generator=generator)
    matrices = matrix_cpu.ConstantMatrices(weight, torch.float32)
    for count in (*range(1, 14), 95, 96, 97, 200):
        rows = torch.randn(2, count, depth, generator=generator)
        poisoned(2, count, columns, dtype=torch.float32)
        insist_on(matrices.multiply(rows), rows.double() @ weight.double(), torch.float32)
    with pytest.raises(DydiffError, match="multiply as many columns"):
        matrices.multiply(torch.zeros(2, 3, depth + 1))


@DTYPES
@pytest.mark.parametrize("name, length", [("downsample", 2), ("downsample", 26), ("upsample", 1), ("upsample", 25)])
def test_resampling(name, length, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(16, 16, 3, 2, 1) if name == "downsample" else torch.nn.ConvTranspose1d(16, 16, 4, 2, 1)
    x = torch.randn(3, length, 16)
    blocks = CpuBlocks(dtype)
    ours = getattr(blocks, name)(x.to(dtype), blocks.pack(layer.state_dict())).double()
    exact = layer.double()(x.double().transpose(1, 2)).transpose(1, 2)
    plain = layer.to(dtype)(x.to(dtype).transpose(1, 2)).transpose(1, 2).double()
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@DTYPES
@pytest.mark.parametrize(
    "horizon, dim, mults, data_dim", [(4, 64, (1, 2, 4), 3), (20, 16, (1, 2, 4), 7), (100, 16, (1, 4, 8), 14), (7, 8, (2,), 1)]
)
def test_whole_network(horizon, dim, mults, data_dim, dtype):
    torch.manual_seed(0)
    unet = UNet(data_dim, horizon, dim, mults)
    x, label = torch.randn(5, horizon, data_dim), torch.tensor([0.3])
    fused = FusedUNet(unet, CpuBlocks(dtype))
    ours = fused(x, fused.time_table(label)[0])
    with torch.no_grad():
        exact = unet.double()(x.double(), label.double())
        plain = unet.to(dtype)(x.to(dtype), label.to(dtype)).double()
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - exact).norm() <= WINOGRAD_FACTOR[dtype] * (plain - exact).norm()


@DTYPES
@pytest.mark.parametrize("joined", [True, False])
def test_thread_count_changes_nothing(joined, dtype):
    unet = UNet(3, 8, 8, (1, 2))
    fused = FusedUNet(unet, CpuBlocks(dtype))
    x, biases = torch.randn(7, 8, 3), fused.time_table(torch.tensor([0.1]))[0]
    threads = torch.get_num_threads()
    if not joined:
        native.extension.threads.join(0, 0, 0)  # threads of its own, as beside a PyTorch without OpenMP
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fused(x, biases))
    finally:
        torch.set_num_threads(threads)
        native.join_threads()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch may have another kind of threads")
def test_the_extension_joins_the_threads_of_pytorch():
    assert native.join_threads()


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_what_is_fast_and_right_where_norms_go_over_few_elements(fast, monkeypatch):
    monkeypatch.setattr(backend_choice, "has_fast_bf16", lambda device: fast)
    chosen = {}
    for horizon in (4, 8, 16, 32):
        denoiser = Denoiser(UNet(3, horizon, 8, (1, 2, 4)), 2)
        chosen[denoiser.network.smallest_group] = choose_backend(denoiser, torch.device("cpu"))
    assert chosen == {2: "extension", 4: "winograd", 8: "winograd", 16: "bf16" if fast else "winograd"}


@pytest.mark.parametrize("backend, horizon, refused", [("bf16", 32, 16), ("winograd", 8, 4)])
def test_norms_over_too_few_elements_are_refused_with_a_remedy(backend, horizon, refused):
    apply_backend(Denoiser(UNet(3, horizon, 8, (1, 2, 4)), 2), backend)
    with pytest.raises(DydiffError, match=f"over {refused} elements or more, not over {refused // 2},.*backend=extension"):
        apply_backend(Denoiser(UNet(3, horizon // 2, 8, (1, 2, 4)), 2), backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_other_kernel_sizes_are_refused_with_a_remedy_and_auto_avoids_them(backend):
    denoiser = Denoiser(UNet(3, 8, 8, (1, 2), kernel_size=3), 2)
    with pytest.raises(DydiffError, match="backend=extension"):
        prepare_denoiser(denoiser, backend)
    assert choose_backend(denoiser, torch.device("cpu")) == "extension"
