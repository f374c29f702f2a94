"""What evaluates the diffusion network during a rollout: plain PyTorch, torch.compile, or fused blocks in 16 bit.

    reference   float32, plain PyTorch throughout: the oracle
    extension   float32 network, compiled sampler step (csrc/)
    compiled    float32 network through torch.compile
    bf16        CPU: fused Winograd blocks in bfloat16 (kernels/unet_cpu.py)
    auto        the fastest that keeps rollouts within 2e-2 of float32 on the device at hand
"""

from __future__ import annotations

import torch
from torch import Tensor

from dydiff.capture import compile_function
from dydiff.diffusion.edm import Denoiser, FusedDenoiser
from dydiff.errors import DydiffError
from dydiff.kernels import edm
from dydiff.kernels.unet_cpu import CpuBlocks
from dydiff.networks.unet import UNet

BACKENDS = ("auto", "reference", "extension", "compiled", "bf16")

SamplingDenoiser = Denoiser | FusedDenoiser


class CompiledDenoiser:
    """A denoiser whose network runs through torch.compile; offers what samplers use."""

    def __init__(self, denoiser: Denoiser):
        self.sigma_data = denoiser.sigma_data
        self._network = compile_function(denoiser.network)

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The same as `Denoiser.evaluate`."""
        return self._network(model_input, model_input.new_full((1,), sigma).log() / 4)


def choose_backend(denoiser: Denoiser) -> str:
    """What `auto` stands for with this network on its device."""
    device = next(denoiser.parameters()).device
    fits = isinstance(denoiser.network, UNet) and denoiser.network.kernel_size == 5
    if device.type == "cpu" and fits and has_fast_bf16() and not edm.why_unavailable(device):
        return "bf16"
    return "extension" if edm.available_backend(device, torch.float32) == "extension" else "reference"


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; without that, bf16 would be slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare_denoiser(denoiser: Denoiser, backend: str) -> tuple[SamplingDenoiser | CompiledDenoiser, str]:
    """Return what the sampler evaluates, and the name of the sampler step that goes with it.

    Fused backends copy the weights as they are now.

    Raises:
        DydiffError: unknown backend, one that this network or device cannot use, or one that is not built.
    """
    backend = choose_backend(denoiser) if backend == "auto" else backend
    if backend == "reference":
        return denoiser, "reference"
    if backend == "extension":
        return denoiser, "extension"
    if backend == "compiled":
        return CompiledDenoiser(denoiser), "auto"
    if backend == "bf16":
        device = next(denoiser.parameters()).device
        if not isinstance(denoiser.network, UNet) or device.type != "cpu":
            raise DydiffError("The bf16 backend is for UNet_RL on the CPU; use backend=auto.")
        return FusedDenoiser(denoiser, CpuBlocks()), "extension"
    raise DydiffError(f"Rollout backend '{backend}' is unknown; choose one of {', '.join(BACKENDS)}.")
