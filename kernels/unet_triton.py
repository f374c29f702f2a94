"""The U-Net's blocks on Triton: two backends for `dydiff.networks.fused_unet`, in float16 or bfloat16 with float32 sums.

    TwoPassBlocks ("triton-b")   convolution with statistics, then one elementwise pass: any width, any length
    FusedBlocks   ("triton-a")   one kernel a block where whole samples and groups fit a tile, elsewhere as above

Both compute what unet_reference.py does, forward only, on NVIDIA cards from compute capability 8.0. Nothing waits for the
device and all memory comes from PyTorch's allocator, so a whole evaluation can be captured in a CUDA graph after one warm-up
call, which also compiles the kernels. Results do not depend on the order in which programs run. What a backend gains is
unmeasured so far: see benchmarks/test_kernel_speed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import layout, packing
from dydiff.kernels.convolution import Form, convolve
from dydiff.kernels.fused_block import fuse_block
from dydiff.kernels.launch import Launch
from dydiff.kernels.layout import Activation
from dydiff.kernels.normalisation import normalise
from dydiff.kernels.packing import ConvBlock, Convolution, Residual, ResidualBlock

DTYPES = (torch.float16, torch.bfloat16)


def why_unavailable(device: torch.device | str = "cuda") -> str:
    """Why the Triton blocks cannot run on this device; empty if they can."""
    if triton.knobs.runtime.interpret:
        return ""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f'The Triton blocks need an NVIDIA GPU, which "{device}" is not; use sampler_kwargs.backend=auto.'
    capability = device_capability(device)
    if capability < 80:
        return f"The Triton blocks need compute capability 8.0 or newer, and {device} has {capability / 10}."
    return ""


@cache
def device_capability(device: torch.device) -> int:
    """90 for compute capability 9.0; other devices than CUDA (the interpreter) are treated as an H100."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class TwoPassBlocks:
    """Blocks backend with a convolution kernel and a normalisation kernel for each convolution block.

    dtype: float16 (three more bits of precision) or bfloat16 (more range). kernel_size: the largest of the network.
    capability: the card's, 90 for an H100; by default that of the tensors' device. execute: what happens to a launch.

    Raises:
        DydiffError: another dtype, or a convolution longer than kernel_size.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float16,
        kernel_size: int = 5,
        capability: int | None = None,
        execute: Callable[[Launch], None] = Launch.run,
    ):
        if dtype not in DTYPES:
            raise DydiffError(f"The Triton blocks compute in float16 or bfloat16, not {dtype}; PyTorch's take any dtype.")
        self.dtype = dtype
        # Down- and upsampling read one position beyond the ends too.
        self.gap = max(kernel_size // 2, 1)
        self.capability = capability
        self.execute = execute

    def pack(self, weights: dict[str, Tensor]) -> ResidualBlock | ConvBlock | Convolution:
        packed = packing.pack(weights, self.dtype)
        taps = max(weight.shape[2] for weight in weights.values() if weight.ndim == 3)
        if taps // 2 > self.gap and taps % 2:
            raise DydiffError(
                f"The U-Net has convolutions of {taps} taps, but the Triton blocks were made for at most {2 * self.gap + 1}: "
                f"pass kernel_size={taps}."
            )
        return packed

    def enter(self, x: Tensor) -> Activation:
        return layout.enter(x, self.gap, self.dtype)

    def residual_block(self, x: Activation, skip: Activation | None, packed: ResidualBlock, time_bias: Tensor) -> Activation:
        sources = (x,) if skip is None else (x, skip)
        hidden = self.conv_block(sources, packed.block1, time=time_bias.float())
        return self.conv_block((hidden,), packed.block2, residual=packed.residual_of(sources))

    def downsample(self, x: Activation, packed: Convolution) -> Activation:
        return self.convolve((x,), packed, Form(stride=2, gapped=True))

    def upsample(self, x: Activation, packed: Convolution) -> Activation:
        return self.convolve((x,), packed, Form(gapped=True))

    def leave(self, x: Activation, final_block: ConvBlock, final_conv: Convolution) -> Tensor:
        return self.project(self.conv_block((x,), final_block), final_conv)

    def project(self, x: Activation, packed: Convolution) -> Tensor:
        """The network's last 1x1 convolution -> [B, H, D] float32."""
        y = self.convolve((x,), packed, Form(dtype=torch.float32))  # [B H, D]
        return y.view(x.batch, x.length, y.shape[1])

    def conv_block(
        self,
        sources: tuple[Activation, ...],
        block: ConvBlock,
        time: Tensor | None = None,
        residual: Residual | None = None,
    ) -> Activation:
        """mish(group_norm(conv(sources))) + time + residual, either of which may be absent."""
        launch, raw, statistics = convolve(sources, block.convolution, self.capability_of(sources[0]), Form(statistics=True))
        self.execute(launch)
        added = None
        if residual is not None:
            whole = residual.convolution is None
            added = residual.sources[0] if whole else self.convolve(residual.sources, residual.convolution, Form())
        out = sources[0].empty(sources[0].length, raw.shape[1])
        self.execute(normalise(raw, statistics, block.scale, block.shift, out, time, added))
        return out

    def convolve(self, sources: tuple[Activation, ...], convolution: Convolution, form: Form) -> Tensor | Activation:
        launch, out, _ = convolve(sources, convolution, self.capability_of(sources[0]), form)
        self.execute(launch)
        return out

    def capability_of(self, x: Activation) -> int:
        return self.capability or device_capability(x.rows.device)


class FusedBlocks(TwoPassBlocks):
    """Blocks backend with one kernel for each convolution block whose samples and groups fit a tile."""

    def conv_block(
        self,
        sources: tuple[Activation, ...],
        block: ConvBlock,
        time: Tensor | None = None,
        residual: Residual | None = None,
    ) -> Activation:
        out = sources[0].empty(sources[0].length, len(block.scale))
        launch = fuse_block(sources, block, out, self.capability_of(sources[0]), time, residual)
        if launch is None:
            return super().conv_block(sources, block, time, residual)
        self.execute(launch)
        return out
