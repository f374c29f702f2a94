"""What `torch.cuda` offers, for the cards that `pretend_gpu` pretends: devices, streams, random numbers, and graphs.

A graph is the list of operations that were dispatched while it was captured. Nothing is computed then, as far as anyone can see:
what was written is taken back, and what was made holds NaN until a replay, which computes into the same memory again. So it
notices what a card would not forgive: a read by the host, a generator that is not registered, memory that was let go since.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

CARDS = 2
NAME, CAPABILITY, BYTES = "Pretended GPU", (9, 0), 80 << 30

limits = SimpleNamespace(largest_tensor=BYTES)
_state = SimpleNamespace(device=0, graph=None, capture_stream=None, random=[])


def current_device() -> int:
    return _state.device


def capturing() -> CUDAGraph | None:
    return _state.graph


def pick(which: Any) -> int:
    """The index of the card that is meant, the current one by default."""
    index = which if isinstance(which, int) or which is None else torch.device(which).index
    return _state.device if index is None else index


def with_index(device: torch.device | str | int | None) -> torch.device | None:
    """A device with the index that CUDA would complete it by."""
    device = torch.device("cuda", device) if isinstance(device, int) else device and torch.device(device)
    if device is None or device.type != "cuda":
        return device
    if device.index is not None and device.index >= CARDS:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", _state.device) if device.index is None else device


@contextlib.contextmanager
def device(which: Any) -> Iterator[None]:
    before, _state.device = _state.device, pick(which)
    try:
        yield
    finally:
        _state.device = before


class PretendedGenerator(torch.Generator):
    """A generator that is on the device it was made for."""

    def __new__(cls, device: torch.device | str = "cpu"):
        self = super().__new__(cls, "cpu")
        self._where = with_index(device)
        generators[self._cdata] = self
        return self

    device = property(lambda self: self._where)

    def set_state(self, state: torch.Tensor) -> torch.Generator:
        if type(state) is not torch.Tensor:
            raise TypeError("RNG state must be a torch.ByteTensor")
        return super().set_state(state)

    def __reduce__(self):
        raise TypeError("a pretended generator stays in its process")


lost_generators: set[int] = set()  # which a capture that failed has left as if it went on
_pools = itertools.count(1)
lost_pools: set[tuple[int, int]] = set()  # the same of memory
_users: dict[tuple[int, int], weakref.WeakSet[CUDAGraph]] = {}  # the graphs of each pool
generators: weakref.WeakValueDictionary[int, PretendedGenerator] = weakref.WeakValueDictionary()  # by what C++ hands over


class Stream:
    """A queue of a card; here everything is done at once."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0):
        self.device = torch.device("cuda", pick(device))

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        synchronize()


class Event:
    """A moment in a queue."""

    def __init__(self, enable_timing: bool = False):
        self.moment = None

    def record(self, stream: Stream | None = None) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.moment - self.moment)


def synchronize(device: Any = None) -> None:
    if _state.graph is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class CUDAGraph:
    """Operations in a row, in the memory that they were captured in."""

    def __init__(self):
        self.device: torch.device | None = None
        self._operations: list[tuple[Callable[[list[Any]], Any], list[Any], list[tuple[torch.Tensor, int]]]] = []
        self._made: list[torch.Tensor] = []  # by the operations themselves: the graph keeps this memory
        self._needed: dict[int, weakref.ref] = {}  # what others own, by its address
        self._undo: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generators: dict[int, tuple[Any, torch.Tensor | None]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        if generator.device.type != "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator")
        self._generators[generator._cdata] = generator, None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        assert _state.graph is None and not self._operations
        self.device = torch.device("cuda", _state.device)
        states = [(generator, generator.get_state()) for generator, _ in self._generators.values()]
        own = _state.random[self.device.index].clone()
        _state.graph = self
        names = {generator._cdata for generator, _ in self._generators.values()}
        try:
            yield
            lost_generators.difference_update(names)
        except torch.OutOfMemoryError:
            raise
        except BaseException:  # as PyTorch up to 2.12 has it
            lost_generators.update(names)
            raise
        finally:
            _state.graph = None
            _state.random[self.device.index] = own
            for generator, state in states:
                generator.set_state(state)
            for elem, before in reversed(self._undo):
                elem.copy_(before)
            self._undo.clear()
        for elem in self._made:
            if elem.is_floating_point():
                elem.fill_(float("nan"))

    def record(self, function: Any, compute: Callable[[list[Any]], Any], tensors: list[Any], plain: list[Any]) -> Any:
        """Compute while capturing, in a way that can be taken back and repeated."""
        for leaf in plain:
            if isinstance(leaf, torch._C.Generator) and leaf._cdata not in self._generators:
                raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        made = {elem.untyped_storage()._cdata for elem in self._made}
        for tensor in tensors:
            where = tensor.elem.untyped_storage()._cdata
            if where not in made:
                self._needed.setdefault(where, weakref.ref(tensor.memory))
        written = [argument for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write]
        writes = bool(written) and torch.Tag.inplace_view not in function.tags
        if writes:
            self._undo += [
                (tensor.elem.detach(), tensor.elem.clone())
                for tensor in tensors
                if tensor.elem.untyped_storage()._cdata not in made
            ]
        # Views of their own: operations in place may give what they are computed from another shape.
        fixed = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in plain]
        result = compute(plain)
        given = {leaf.untyped_storage()._cdata for leaf in plain if isinstance(leaf, torch.Tensor)}
        fresh = [
            (leaf.detach(), place)
            for place, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given
        ]
        self._made += [leaf for leaf, _ in fresh]
        if writes or fresh:
            self._operations.append((compute, fixed, fresh))
        return result

    def replay(self) -> None:
        assert self._operations, "The CUDA graph is empty"
        if _state.graph is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        lost = [where for where, memory in self._needed.items() if memory() is None]
        if lost:
            raise AssertionError(f"A graph is replayed that reads or writes {len(lost)} tensors whose memory was let go since.")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for compute, fixed, fresh in self._operations:
                leaves = tree_leaves(compute(fixed))
                for elem, place in fresh:
                    elem.copy_(leaves[place])

    def reset(self) -> None:
        self.__init__()


@contextlib.contextmanager
def graph(captured: CUDAGraph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
    synchronize()
    _state.capture_stream = _state.capture_stream or Stream()  # once for all, as PyTorch does
    if pool in lost_pools:
        raise RuntimeError(f"beginAllocateToPool: already recording to mempool_id {pool}")
    if pool in _users and not _users[pool]:
        raise RuntimeError('it->second->use_count > 0 INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp"')
    _users.setdefault(pool or (0, next(_pools)), weakref.WeakSet()).add(captured)
    try:
        with device((stream or _state.capture_stream).device), captured.capture():
            yield
    except torch.OutOfMemoryError:
        raise
    except BaseException:  # as PyTorch up to 2.11 has it
        lost_pools.update({pool} - {None})
        raise


@contextlib.contextmanager
def stream(which: Stream) -> Iterator[None]:
    with device(which.device):
        yield


@contextlib.contextmanager
def own_random_numbers(function: Any, leaves: list[Any], target: torch.device) -> Iterator[None]:
    """Let an operation without a generator draw from its card's own."""
    draws = torch.Tag.nondeterministic_seeded in function.tags
    if not draws or target.type != "cuda" or any(isinstance(leaf, torch._C.Generator) for leaf in leaves):
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_state.random[target.index])
    try:
        yield
    finally:
        _state.random[target.index] = torch.get_rng_state()
        torch.set_rng_state(before)


def manual_seed_all(seed: int) -> None:
    _state.random = [torch.Generator("cpu").manual_seed(seed).get_state() for _ in range(CARDS)]


def _set_states(states: list[torch.Tensor]) -> None:
    if len(states) > CARDS:
        raise IndexError("tuple index out of range")
    _state.random = [state.clone() for state in states]


def _set_device(which: Any) -> None:
    _state.device = pick(which)


PROPERTIES = SimpleNamespace(
    name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=BYTES, multi_processor_count=132, L2_cache_size=50 << 20
)
STAND_INS = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: CARDS,
    "current_device": current_device,
    "set_device": _set_device,
    "device": device,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: CAPABILITY,
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (BYTES, BYTES),
    **dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda device=None: 1 << 20
    ),
    **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "reset_max_memory_allocated"), lambda device=None: None),
    "set_per_process_memory_fraction": lambda fraction, device=None: None,
    "synchronize": synchronize,
    "Stream": Stream,
    "stream": stream,
    "current_stream": Stream,
    "default_stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "graph_pool_handle": lambda: (0, next(_pools)),
    "set_stream": lambda stream: _set_device(stream.device),
    "is_current_stream_capturing": lambda: _state.graph is not None,
    "manual_seed_all": manual_seed_all,
    "manual_seed": manual_seed_all,
    "get_rng_state_all": lambda: [state.clone() for state in _state.random],
    "set_rng_state_all": _set_states,
}


@contextlib.contextmanager
def patched(more: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put the stand-ins, and `more` of them, into their places."""
    with contextlib.ExitStack() as stack:
        for name, value in STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for place in more:
            stack.enter_context(mock.patch.object(*place))
        _state.device, _state.capture_stream, limits.largest_tensor = 0, None, BYTES
        manual_seed_all(0)
        yield
