"""What evaluates the diffusion network during a rollout: plain PyTorch, torch.compile, or fused blocks.

    reference   float32, plain PyTorch throughout: the oracle
    extension   float32 network, compiled sampler step (csrc/)
    compiled    float32 network through torch.compile
    bf16        CPU: fused Winograd blocks in bfloat16 (kernels/unet_cpu.py)
    winograd    CPU: the same in float32
    cudnn       GPU: float16, cuDNN's convolutions and one kernel for what follows each (kernels/unet_cudnn.py)
    triton-a    GPU: float16, one kernel a convolution with its normalisation, where a tile holds whole samples; else triton-b
    triton-b    GPU: float16, the convolution as one matrix product and a second pass for the normalisation
    triton-c    GPU: float16, Winograd convolutions whose products are cuBLAS's (kernels/winograd_triton.py)
    auto        the fastest that keeps rollouts within 2e-2 of float32: on the CPU bf16, where the processor multiplies bfloat16
                and no norm goes over a few elements only, else winograd; on a GPU the fastest of those in float16 that a trial
                there, with the network's own weights, finds right and faster than float32 (trial.py); else, and for networks
                that the others are not for, extension
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dydiff.capture import can_compile, compile_function
from dydiff.device import has_fast_bf16
from dydiff.diffusion.edm import Denoiser, FusedDenoiser
from dydiff.errors import DydiffError, NotForNetwork
from dydiff.kernels import edm
from dydiff.kernels.unet_cpu import CpuBlocks
from dydiff.kernels.winograd import TAPS
from dydiff.memory import is_out_of_memory
from dydiff.networks.fused_unet import Blocks
from dydiff.networks.unet import UNet
from dydiff.progress import say
from dydiff.trial import find_fault, time_evaluations

ON_CPU = {"bf16": torch.bfloat16, "winograd": torch.float32}
ON_GPU = ("cudnn", "triton-a", "triton-b", "triton-c")  # in float16
BACKENDS = ("auto", "reference", "extension", "compiled", *ON_CPU, *ON_GPU)
IN_16_BIT = ("bf16", *ON_GPU)
# A norm over few elements blows up rounding: with groups of 2 the network was wrong by 50 %, with 32 and more by 2 to 4 %.
SMALLEST_GROUP = 32
LARGEST_TRIAL = 2048  # starts
_verdicts: WeakKeyDictionary[Denoiser, dict[tuple[torch.device, int], str]] = WeakKeyDictionary()  # of trials in this process


class CompiledDenoiser:
    """A denoiser whose network runs through torch.compile; offers what samplers use."""

    def __init__(self, denoiser: Denoiser):
        self.sigma_data = denoiser.sigma_data
        self._network = compile_function(denoiser.network)

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The same as `Denoiser.evaluate`."""
        return self._network(model_input, model_input.new_full((1,), math.log(sigma) / 4))


SamplingDenoiser = Denoiser | FusedDenoiser | CompiledDenoiser


def prepare_denoiser(denoiser: Denoiser, backend: str, batch: int = LARGEST_TRIAL) -> SamplingDenoiser:
    """Turn a denoiser into what the sampler evaluates; fused backends copy the weights as they are now.

    `batch` is the number of starts that `auto` chooses a backend for on a GPU.

    Raises:
        DydiffError: unknown backend, one that this network or device cannot use, or one that is not built.
    """
    if backend not in BACKENDS:
        raise DydiffError(f"Rollout backend '{backend}' is unknown; choose one of {', '.join(BACKENDS)}.")
    device = next(denoiser.parameters()).device
    if backend == "auto":
        backend = choose_backend(denoiser, device, batch)
    if backend == "extension" and edm.why_unavailable(device):
        raise DydiffError(edm.why_unavailable(device))
    if backend == "compiled":
        return CompiledDenoiser(denoiser)
    if backend in ON_CPU:
        if device.type != "cpu" or not isinstance(denoiser.network, UNet):
            raise NotForNetwork(f"Rollout backend '{backend}' is for UNet_RL on the CPU; use 'auto'.")
        return FusedDenoiser(denoiser, CpuBlocks(ON_CPU[backend]))
    if backend in ON_GPU:
        return FusedDenoiser(denoiser, _make_gpu_blocks(denoiser, backend, device))
    return denoiser


def _make_gpu_blocks(denoiser: Denoiser, backend: str, device: torch.device) -> Blocks:
    from dydiff.kernels import unet_triton  # these import triton, which only a GPU needs
    from dydiff.kernels.unet_cudnn import CudnnBlocks
    from dydiff.kernels.winograd_triton import TritonWinogradBlocks

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
        "triton-c": TritonWinogradBlocks,
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


def choose_backend(denoiser: Denoiser, device: torch.device, batch: int = LARGEST_TRIAL) -> str:
    """What `auto` stands for with this network on this device; on a GPU a trial with `batch` starts decides and says so.

    Raises:
        DydiffError: the trial left the GPU unusable for this process.
    """
    network = denoiser.network
    fits = isinstance(network, UNet) and network.kernel_size == TAPS
    if device.type == "cpu" and fits and not edm.why_unavailable(device):
        return "bf16" if has_fast_bf16(device) and network.smallest_group >= SMALLEST_GROUP else "winograd"
    plain = edm.available_backend(device, torch.float32)
    if device.type == "cuda" and isinstance(network, UNet):
        verdicts, key = _verdicts.setdefault(denoiser, {}), (device, min(batch, LARGEST_TRIAL))
        if key not in verdicts:
            verdicts[key] = _race_backends(denoiser, *key, plain)
        return verdicts[key]
    return plain


def _race_backends(denoiser: Denoiser, device: torch.device, batch: int, plain: str) -> str:
    """The fastest backend that is right on this GPU, `plain` among them; warns where that is `plain`."""
    shape = batch, denoiser.network.horizon, denoiser.network.data_dim
    try:
        seconds = {plain: time_evaluations(denoiser.evaluate, shape, device)}
    except Exception as error:
        if not is_out_of_memory(error) or batch == 1:
            raise
        seconds = {}
    if not seconds:  # behind the except clause, whose error keeps tensors alive
        torch.cuda.empty_cache()
        return _race_backends(denoiser, device, batch // 2, plain)
    faults = []
    for backend in ON_GPU:
        fault = ""
        say(f"Trying rollout backend {backend} on {device}: compiling its kernels for the first time may take a minute.")
        try:
            evaluate = prepare_denoiser(denoiser, backend).evaluate
            if not (fault := find_fault(evaluate, denoiser.evaluate, shape, device)):
                seconds[backend] = time_evaluations(evaluate, shape, device)
        except Exception as error:  # whatever a kernel's compiler or launch raises; float32 needs neither
            fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            _insist_on_usable(device, backend, fault, min(seconds, key=seconds.get))
        if fault:
            faults.append(f" {backend} cannot be used here: {fault}.")
    fastest = min(seconds, key=seconds.get)
    times = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    message = "".join([f"An evaluation of {batch} starts took {times}.", *faults])
    if fastest == plain:
        warnings.warn(f"Rollouts are computed in float32. {message}", RuntimeWarning, stacklevel=2)
    else:
        say(f"Rollouts take {fastest}. {message}")
    return fastest


def _insist_on_usable(device: torch.device, backend: str, fault: str, remedy: str) -> None:
    """Raise DydiffError, which recommends a backend, where another one's failure left a GPU unusable for this process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DydiffError(
            f"The trial of rollout backend {backend} failed and left {device} unusable ({fault}). Start again with "
            f"--set sampler_kwargs.backend={remedy}, which passed."
        ) from error
