"""Which backend `auto` stands for: on a CPU by what the processor multiplies, on a GPU by a trial there.

The trial runs in a process of its own, so that a kernel that hangs, crashes or leaves the GPU unusable costs that process alone;
another one goes on with the backends that are left.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from dydiff.backends import BACKENDS, ON_GPU, SamplingDenoiser, apply_backend
from dydiff.backends.trial import find_fault, time_evaluations
from dydiff.child import Child, ChildEnded, connect_to_parent, decode, encode, end_with_parent
from dydiff.device import has_fast_bf16
from dydiff.diffusion.edm import Denoiser
from dydiff.errors import DydiffError
from dydiff.kernels import edm
from dydiff.kernels.winograd import SMALLEST_GROUP, TAPS
from dydiff.memory import is_out_of_memory
from dydiff.networks.unet import UNet
from dydiff.progress import say

LARGEST_TRIAL = 2048  # starts
PATIENCE = 300.0  # seconds for the trial of a backend, most of which its kernels take to be compiled for the first time
Shape = tuple[int, int, int]  # of trajectories: B, H, D
_verdicts: WeakKeyDictionary[Denoiser, dict[tuple[torch.device, int], str]] = WeakKeyDictionary()  # of trials for this process


class Report(NamedTuple):
    """What a trial says of a backend: nothing as it begins; at its end the seconds of an evaluation, or what is wrong with it."""

    backend: str
    seconds: float | None = None
    fault: str = ""


class DeviceLost(Exception):
    """After an error of a backend the device is of no use to this process any more."""


def prepare_denoiser(denoiser: Denoiser, backend: str, batch: int = LARGEST_TRIAL) -> SamplingDenoiser:
    """Turn a denoiser into what the sampler evaluates; fused backends copy the weights as they are now.

    `batch` is the number of starts that `auto` chooses a backend for on a GPU.

    Raises:
        DydiffError: unknown backend, one that this network or device cannot use, or one that is not built.
    """
    if backend not in BACKENDS:
        raise DydiffError(f"Rollout backend '{backend}' is unknown; choose one of {', '.join(BACKENDS)}.")
    if backend == "auto":
        backend = choose_backend(denoiser, next(denoiser.parameters()).device, batch)
    return apply_backend(denoiser, backend)


def choose_backend(denoiser: Denoiser, device: torch.device, batch: int = LARGEST_TRIAL) -> str:
    """What `auto` stands for with this network on this device; on a GPU a trial with `batch` starts decides and says so.

    Raises:
        DydiffError: as `race`.
    """
    network = denoiser.network
    if device.type == "cpu" and isinstance(network, UNet) and network.kernel_size == TAPS and not edm.why_unavailable(device):
        for backend in ("bf16", "winograd") if has_fast_bf16(device) else ("winograd",):
            if network.smallest_group >= SMALLEST_GROUP[backend]:
                return backend
    plain = edm.available_backend(device, torch.float32)
    if device.type == "cuda" and isinstance(network, UNet):
        verdicts, key = _verdicts.setdefault(denoiser, {}), (device, min(batch, LARGEST_TRIAL))
        if key not in verdicts:
            verdicts[key] = race(denoiser, *key, plain, ON_GPU)
        return verdicts[key]
    return plain


def race(denoiser: Denoiser, device: torch.device, batch: int, plain: str, candidates: Sequence[str]) -> str:
    """The fastest backend that is right on this device; warns where none of `candidates` is faster than `plain`.

    Raises:
        DydiffError: the trial could not have a process of its own, and left the device unusable for this one.
    """
    shape, plain_seconds = _time_plain(denoiser, device, batch)
    seconds, faults, left = {plain: plain_seconds}, {}, list(candidates)
    try_backends = _try_apart
    while left:
        begun = ""
        try:
            for report in try_backends(denoiser, shape, device, tuple(left)):
                begun = report.backend
                if report.fault:
                    faults[begun] = report.fault
                elif report.seconds is not None:
                    seconds[begun] = report.seconds
                else:
                    say(f"Trying rollout backend {begun} on {device}: compiling its kernels for the first time may take a minute.")
                    continue
                left.remove(begun)
        except (ChildEnded, TimeoutError) as error:
            reason = (
                f"it took more than {PATIENCE:g} s"
                if isinstance(error, TimeoutError)
                else f"its process ended {error} (what it printed stands above)"
            )
            if begun in left:
                left.remove(begun)
                faults[begun] = f"in its trial, {reason}"
            elif not begun:
                say(f"Rollout backends are tried in this process, since another one did not get to use {device}: {reason}.")
                try_backends = _try_here
        except DeviceLost as error:
            remedy = min(seconds, key=seconds.get)
            raise DydiffError(
                f"The trial of rollout backend {begun} failed and left {device} unusable ({faults[begun]}). Start again with "
                f"--set sampler_kwargs.backend={remedy}, which passed."
            ) from error
    fastest = min(seconds, key=seconds.get)
    times = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    told = [f" {name} cannot be used here: {fault}." for name, fault in faults.items()]
    message = "".join([f"An evaluation of {shape[0]} starts took {times}.", *told])
    if fastest == plain:
        warnings.warn(f"Rollouts are computed in float32. {message}", RuntimeWarning, stacklevel=2)
    else:
        say(f"Rollouts take {fastest}. {message}")
    return fastest


def _time_plain(denoiser: Denoiser, device: torch.device, batch: int) -> tuple[Shape, float]:
    """Seconds of an evaluation in float32, and the shape [B, H, D] that it has: with half of the starts where memory runs out."""
    shape = batch, denoiser.network.horizon, denoiser.network.data_dim
    try:
        return shape, time_evaluations(denoiser.evaluate, shape, device)
    except Exception as error:
        if not is_out_of_memory(error) or batch == 1:
            raise
    torch.cuda.empty_cache()  # behind the except clause, whose error keeps tensors alive
    return _time_plain(denoiser, device, batch // 2)


def _try_here(denoiser: Denoiser, shape: Shape, device: torch.device, names: Sequence[str]) -> Iterator[Report]:
    """Try backends in this process; raises DeviceLost after the report of a fault that leaves no way to go on."""
    for backend in names:
        yield Report(backend)
        seconds, fault = None, ""
        try:
            evaluate = apply_backend(denoiser, backend).evaluate
            if not (fault := find_fault(evaluate, denoiser.evaluate, shape, device)):
                seconds = time_evaluations(evaluate, shape, device)
        except Exception as error:  # whatever a kernel's compiler or launch raises; float32 needs neither
            fault = _first_line(error)
        yield Report(backend, seconds, fault)
        if fault:
            _insist_on_usable(device)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _insist_on_usable(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost from error


def _try_apart(denoiser: Denoiser, shape: Shape, device: torch.device, names: Sequence[str]) -> Iterator[Report]:
    """The same in a process of its own; raises ChildEnded or TimeoutError where it does not get to its end."""
    network = denoiser.network
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of which that process takes its own
    child = Child("dydiff.backends.choice")
    with contextlib.closing(child):
        task = {"sizes": network.sizes, "observation_dim": denoiser.observation_dim, "sigma_data": denoiser.sigma_data}
        weights = {name: weight.cpu() for name, weight in network.state_dict().items()}
        child.send({**task, "weights": weights, "shape": list(shape), "device": str(device), "names": list(names)})
        while report := child.receive(PATIENCE):
            yield Report(**report)


def work(connection: Connection) -> None:
    """The body of that process: try what is asked for, report, and say with an empty message that all was tried."""
    task = decode(connection.recv_bytes())
    end_with_parent(connection)  # a kernel that hangs would hold the GPU for ever
    device = torch.device(task["device"])
    denoiser = Denoiser(UNet(**task["sizes"]), task["observation_dim"], task["sigma_data"])
    denoiser.network.load_state_dict(task["weights"])
    try:
        denoiser = denoiser.to(device).eval().requires_grad_(False)
    except (AssertionError, RuntimeError) as error:  # what PyTorch raises where it cannot use a device
        sys.exit(_first_line(error))
    with contextlib.suppress(DeviceLost):
        for report in _try_here(denoiser, tuple(task["shape"]), device, task["names"]):
            connection.send_bytes(encode(report._asdict()))
        connection.send_bytes(encode({}))


if __name__ == "__main__":
    work(connect_to_parent())
