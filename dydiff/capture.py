"""The only place that knows torch.compile and CUDA graphs: turns plain functions into compiled or captured ones."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton  # `import torch` alone does not load that module

from dydiff.errors import DydiffError

REMEDY = "Set DYDIFF_CAPTURE=0 in the environment: all runs without graphs then, only slower."
POLICY_REMEDY = (
    "A policy that is rolled out must not read its tensors on the host (.item(), .cpu(), if tensor:) and may draw from the "
    "rollout's generator alone. Mend it, make the RolloutEngine with capture=False, or set DYDIFF_CAPTURE=0 in the environment."
)


def compile_function(function: Callable[..., Any], setting: str = "sampler_kwargs.backend") -> Callable[..., Any]:
    """Compile a function with Inductor at its first call; raises DydiffError then if the machine cannot compile.

    `setting` is what the message recommends to change.
    """
    return _explain_failures(torch.compile(function, dynamic=False), setting)


def compile_unchecked(function: FunctionType, device: torch.device, setting: str) -> Callable[..., Any]:
    """`compile_function` for a function whose calls are all alike: what they have in common is not checked at every call.

    Its tensors, given or read elsewhere, may change in their values only, and nothing else that it reads may change at all.
    Where gradients cannot be traced (`trace_gradients`), everything is checked, because the function falls apart.
    """
    if not trace_gradients():
        return compile_function(function, setting)
    # Compiled code is kept beside the code that it was made of, which all closures of one `def` share: give it its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "cpp_wrapper": device.type == "cpu"}
    return _explain_failures(torch.compile(own, dynamic=False, options=options), setting)


def _explain_failures(compiled: Callable[..., Any], setting: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            raise DydiffError(
                f"torch.compile cannot compile here ({str(error).splitlines()[0]}). Install a C++ compiler (CPU) or a matching "
                f"Triton (GPU), or choose another {setting}."
            ) from error

    return call


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a compiler for this device: Triton for a GPU, a C++ compiler for the CPU."""
    if device.type == "cuda":
        return has_triton()
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def trace_gradients() -> bool:
    """Let compiled functions hold torch.autograd.grad, instead of falling apart around it; whether this PyTorch can."""
    can = hasattr(torch._dynamo.config, "trace_autograd_ops")
    if can:
        torch._dynamo.config.trace_autograd_ops = True
    return can


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """The stream of a GPU's warm-ups and captures: one, because every stream costs libraries memory of its own."""
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a capture within take cuBLAS's workspace out of its graph's pool, where it stays for as long as the graph does.

    PyTorch keeps one for every stream, whose address graphs keep, too, and from 2.13 on frees it with any graph that was captured
    on the stream.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector at rest: an older graph that it finds in a cycle and destroys would break the capture within."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def captures(device: torch.device) -> bool:
    """Whether what is computed on a device shall be captured: on a GPU, unless DYDIFF_CAPTURE=0 in the environment forbids it."""
    return device.type == "cuda" and os.environ.get("DYDIFF_CAPTURE") != "0"


def make_pool() -> tuple[int, int] | None:
    """A new memory pool for CUDA graphs; None where there is no GPU."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def _end_capture_of(generators: Sequence[torch.Generator]) -> None:
    """Up to 2.12 the generators of a failed capture refuse to draw outside of it, until one that succeeds ends: an empty one."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is empty
        with torch.cuda.graph(graph, stream=_side_stream(torch.cuda.current_device())):
            pass


class CapturedGraph:
    """A function without arguments as a CUDA graph of a device; its draws from `generators` go on from replay to replay.

    The function must have run once before, outside of the capture (`warm_up`). Every replay reads and writes the tensors that the
    function did, which whoever holds the graph keeps alive, and overwrites `output`. Graphs of one `pool` share the memory of what
    they compute in between: none of them may run while another's output is still needed.

    Raises:
        DydiffError: the function cannot be captured; ends with `remedy`.
        torch.OutOfMemoryError: the memory does not hold what it computes.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        *generators: torch.Generator,
        pool: tuple[int, int] | None = None,
        remedy: str = REMEDY,
    ):
        self._device = device
        with torch.cuda.device(device), _without_collector():  # a capture on another device than the current one records nothing
            self._graph = torch.cuda.CUDAGraph()
            for generator in generators:
                self._graph.register_generator_state(generator)
            stream, pool = torch.cuda.current_stream(), pool or make_pool()
            try:
                capture = torch.cuda.graph(self._graph, pool=pool, stream=_side_stream(torch.cuda.current_device()))
                with _own_workspaces(), capture:
                    self.output = function()
            except BaseException as error:
                # PyTorch leaves a failed capture's stream current and, up to 2.11, its pool open: no other would succeed after it.
                torch.cuda.set_stream(stream)
                with contextlib.suppress(RuntimeError):  # closed already
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                _end_capture_of(generators)
                if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise DydiffError(f"A CUDA graph cannot be captured here ({str(error).splitlines()[0]}). {remedy}") from error

    def replay(self) -> Any:
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self.output


class GraphedFunction:
    """A function of tensors to a tuple of tensors, run as CUDA graphs: one graph for each combination of the inputs' shapes.

    A combination's first call runs plainly (libraries allocate, kernels compile), its second one is captured, later ones are
    replayed. All give the same numbers: draws from `generators` go on from call to call. Whatever else the function reads (weights
    of a policy) is read where it was at the capture, so it must be changed in place. Several of them may share a memory `pool`
    (`make_pool`), if they do not run at the same time.

    Raises:
        DydiffError: on capture, where the function waits for the device or draws from another generator; ends with `remedy`.
        torch.OutOfMemoryError: where the memory does not hold what it computes.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        device: torch.device,
        *generators: torch.Generator,
        pool: tuple[int, int] | None = None,
        remedy: str = REMEDY,
    ):
        self._function = function
        self._device = device
        self._generators = generators
        self._pool = pool
        self._remedy = remedy
        self._graphs: dict[tuple[torch.Size, ...], tuple[CapturedGraph, list[Tensor]] | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._graphs:
            outputs = warm_up(lambda: self._function(*inputs), self._device)
            self._graphs[key] = None
            return outputs
        if self._graphs[key] is None:
            self._graphs[key] = self._capture(inputs)
        graph, places = self._graphs[key]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        return tuple(output.clone() for output in graph.replay())  # the next replay overwrites the graph's own

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[CapturedGraph, list[Tensor]]:
        places = [tensor.clone() for tensor in inputs]
        function = partial(self._function, *places)
        return CapturedGraph(function, self._device, *self._generators, pool=self._pool, remedy=self._remedy), places


def capture_if_gpu(
    function: Callable[..., tuple[Tensor, ...]], device: torch.device, *generators: torch.Generator
) -> Callable[..., tuple[Tensor, ...]]:
    """The function as CUDA graphs on a GPU (where it `captures`); elsewhere the function itself."""
    return GraphedFunction(function, device, *generators) if captures(device) else function


def warm_up(function: Callable[[], Any], device: torch.device) -> Any:
    """Call a function on a side stream of a GPU, as it must have been before its capture: libraries allocate their workspaces."""
    with torch.cuda.device(device):
        stream, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return function()
        finally:
            current.wait_stream(stream)
