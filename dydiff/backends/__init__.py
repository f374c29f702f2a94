"""What evaluates the diffusion network during a rollout: plain PyTorch, torch.compile, or fused blocks.

    reference   float32, plain PyTorch throughout: the oracle
    extension   float32 network, compiled sampler step (csrc/)
    compiled    float32 network through torch.compile
    bf16        CPU: fused Winograd blocks in bfloat16 (kernels/unet_cpu.py)
    winograd    CPU: the same in float32
    cudnn       GPU: float16, cuDNN's convolutions and one kernel for what follows each (kernels/unet_cudnn.py)
    triton-a    GPU: float16, one kernel a convolution with its normalisation, where a tile holds whole samples; else triton-b
    triton-b    GPU: float16, the convolution as one matrix product and a second pass for the normalisation
    triton-c    GPU: float16, Winograd convolutions whose products are cuBLAS's (kernels/unet_winograd.py)
    auto        the fastest that keeps rollouts within 2e-2 of float32: on the CPU bf16, where the processor multiplies bfloat16,
                else winograd, and neither where norms go over too few elements; on a GPU the fastest of those in float16 that
                a trial there, with the network's own weights, finds right and faster than float32; else, and for networks that
                the others are not for, extension (choice.py)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from dydiff.capture import can_compile, compile_function
from dydiff.diffusion.edm import Denoiser, FusedDenoiser
from dydiff.errors import DydiffError, NotForNetwork
from dydiff.kernels import edm
from dydiff.kernels.unet_cpu import CpuBlocks
from dydiff.kernels.winograd import SMALLEST_GROUP
from dydiff.networks.fused_unet import Blocks
from dydiff.networks.unet import UNet

ON_CPU = {"bf16": torch.bfloat16, "winograd": torch.float32}
ON_GPU = ("cudnn", "triton-a", "triton-b", "triton-c")  # in float16
BACKENDS = ("auto", "reference", "extension", "compiled", *ON_CPU, *ON_GPU)
IN_16_BIT = ("bf16", *ON_GPU)


class CompiledDenoiser:
    """A denoiser whose network runs through torch.compile; offers what samplers use."""

    def __init__(self, denoiser: Denoiser):
        self.sigma_data = denoiser.sigma_data
        self._network = compile_function(denoiser.network)

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The same as `Denoiser.evaluate`."""
        return self._network(model_input, model_input.new_full((1,), math.log(sigma) / 4))


SamplingDenoiser = Denoiser | FusedDenoiser | CompiledDenoiser


def apply_backend(denoiser: Denoiser, backend: str) -> SamplingDenoiser:
    """Turn a denoiser into what the sampler evaluates; fused backends copy the weights as they are now.

    Raises:
        DydiffError: a backend that this network or device cannot use, or one that is not built.
    """
    device = next(denoiser.parameters()).device
    if backend == "extension" and edm.why_unavailable(device):
        raise DydiffError(edm.why_unavailable(device))
    if backend == "compiled":
        return CompiledDenoiser(denoiser)
    if backend in ON_CPU:
        if device.type != "cpu" or not isinstance(denoiser.network, UNet):
            raise NotForNetwork(f"Rollout backend '{backend}' is for UNet_RL on the CPU; use 'auto'.")
        if denoiser.network.smallest_group < SMALLEST_GROUP[backend]:
            raise NotForNetwork(
                f"Rollout backend '{backend}' is for networks whose norms go over {SMALLEST_GROUP[backend]} elements or more, not "
                f"over {denoiser.network.smallest_group}, which blow up its rounding. Use --set sampler_kwargs.backend=extension."
            )
        return FusedDenoiser(denoiser, CpuBlocks(ON_CPU[backend]))
    if backend in ON_GPU:
        return FusedDenoiser(denoiser, _make_gpu_blocks(denoiser, backend, device))
    return denoiser


def _make_gpu_blocks(denoiser: Denoiser, backend: str, device: torch.device) -> Blocks:
    from dydiff.kernels import unet_triton  # these import triton, which only a GPU needs
    from dydiff.kernels.unet_cudnn import CudnnBlocks
    from dydiff.kernels.unet_winograd import WinogradBlocks

    reason = unet_triton.why_unavailable(device)
    if reason:
        raise DydiffError(reason)
    if not isinstance(denoiser.network, UNet):
        raise NotForNetwork(f"Rollout backend '{backend}' is for UNet_RL; use 'auto'.")
    taps = denoiser.network.kernel_size
    make = {
        "cudnn": CudnnBlocks,
        "triton-a": partial(unet_triton.FusedBlocks, kernel_size=taps),
        "triton-b": partial(unet_triton.TwoPassBlocks, kernel_size=taps),
        "triton-c": WinogradBlocks,
    }
    return make[backend](torch.float16)


def is_available(backend: str, device: torch.device | str = "cpu") -> bool:
    """Whether a backend can be used on this machine's device with a network that fits it."""
    device = torch.device(device)
    if backend in ON_CPU:
        return device.type == "cpu" and not edm.why_unavailable(device)
    if backend == "extension":
        return not edm.why_unavailable(device)
    if backend == "compiled":
        return can_compile(device)
    return backend == "reference" or (device.type == "cuda" and torch.cuda.is_available())
