"""The U-Net's residual blocks at the default network's shapes: PyTorch eager against the backends for GPUs, in float16.

    python -m pytest benchmarks/test_kernel_speed.py

PyTorch gets its fastest layout (Conv2d over [B, C, 1, L], channels last) and cudnn.benchmark. Each result is checked against
float32 on the very inputs that are timed. Needs a CUDA card; TFLOP/s are printed and kept in the benchmark's extra_info.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.kernels.unet_reference import GROUPS, ReferenceBlocks
from dydiff.networks.unet import ResidualBlock

unet_triton = pytest.importorskip("dydiff.kernels.unet_triton")
unet_cudnn = pytest.importorskip("dydiff.kernels.unet_cudnn")
unet_winograd = pytest.importorskip("dydiff.kernels.unet_winograd")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernel speed is measured on a CUDA card; there is none")

BATCH, TAPS, CALLS = 2048, 5, 10
# L, channels of x, of skip, C_out
BLOCKS = [(25, 1024, 0, 1024), (25, 1024, 1024, 512), (50, 512, 0, 512), (50, 512, 512, 128), (100, 128, 0, 128)]
VARIANTS = ["eager", "cudnn", "triton-a", "triton-b", "triton-c"]


class EagerBlocks(ReferenceBlocks):
    """The same in PyTorch's own operators on channels-last images of height 1."""

    def enter(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).transpose(1, 2)[:, :, None].to(memory_format=torch.channels_last)

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: dict[str, Tensor], time_bias: Tensor) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        hidden = self.conv_block(x, packed, "block1.") + time_bias.to(self.dtype)[:, None, None]
        residual = F.conv2d(x, packed["residual.weight"], packed["residual.bias"]) if "residual.weight" in packed else x
        return self.conv_block(hidden, packed, "block2.") + residual

    def pack(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        def image(value: Tensor) -> Tensor:
            return value[:, :, None].contiguous(memory_format=torch.channels_last) if value.ndim == 3 else value

        return {name: image(value) for name, value in super().pack(weights).items()}

    @staticmethod
    def conv_block(x: Tensor, packed: dict[str, Tensor], prefix: str) -> Tensor:
        y = F.conv2d(x, packed[prefix + "conv.weight"], packed[prefix + "conv.bias"], padding=(0, TAPS // 2))
        return F.mish(F.group_norm(y, GROUPS, packed[prefix + "norm.weight"], packed[prefix + "norm.bias"]))


def make_blocks(variant: str):
    makers = {"eager": EagerBlocks, "triton-a": unet_triton.FusedBlocks, "triton-b": unet_triton.TwoPassBlocks}
    makers |= {"cudnn": unet_cudnn.CudnnBlocks, "triton-c": unet_winograd.WinogradBlocks}
    return makers[variant](torch.float16)


def leave(activation) -> Tensor:
    """Any backend's activation as [B, L, C]."""
    if isinstance(activation, Tensor):
        return activation if activation.ndim == 3 else activation.squeeze(2).transpose(1, 2)
    return activation.rows[activation.gap :].view(activation.batch, activation.pitch, -1)[:, : activation.length]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@torch.no_grad()
def test_residual_block(benchmark, shape, variant):
    torch.backends.cudnn.benchmark = True
    length, width, skip_width, columns = shape
    generator = torch.Generator("cuda").manual_seed(0)
    torch.manual_seed(0)
    block = ResidualBlock(width + skip_width, columns, 128, TAPS).cuda()
    x = torch.randn(BATCH, length, width + skip_width, device="cuda", generator=generator)
    time_bias = torch.randn(columns, device="cuda", generator=generator)

    def prepare(blocks, batch: int):
        parts = [blocks.enter(part) for part in x[:batch].split([width, skip_width], dim=2) if part.shape[2]]
        packed = blocks.pack(block.state_dict())

        def compute():
            result = blocks.residual_block(parts[0], parts[1] if skip_width else None, packed, time_bias)
            if isinstance(result, unet_winograd.Output):  # to be computed, for a convolution that comes next
                blocks.points(result)
                return result.rows
            return result

        return compute

    run = prepare(make_blocks(variant), BATCH)
    expected = prepare(ReferenceBlocks(), 32)().transpose(1, 2)  # [B, L, C]
    assert (leave(run())[:32] - expected).abs().max() < 2e-2 * expected.abs().max()

    def timed() -> None:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
    residual = columns * (width + skip_width) if isinstance(block.residual, nn.Conv1d) else 0
    products = TAPS * columns * (width + skip_width + columns) + residual
    rate = 2 * BATCH * length * products * CALLS / benchmark.stats.stats.median / 1e12
    benchmark.extra_info.update(tflops=rate, card=torch.cuda.get_device_name(), variant=variant)
    print(f"\n{variant:9} L {length:3} C {width}+{skip_width} -> {columns}: {rate:.0f} TFLOP/s")
