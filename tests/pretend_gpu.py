"""A GPU that is none: PyTorch of the CPU behaves as if it had CUDA cards, so that what would crash on a card crashes here.

`pretend()` makes `cuda:0` and `cuda:1` seem to exist. A tensor there is an `OnGpu`, which holds its numbers in host memory and is
computed with there; what differs from a CPU is kept: tensors of two devices do not meet in an operation (a host's tensor without
dimensions may, where PyTorch allows it), generators draw on their own device alone, numpy sees nothing of it, and graphs
(`pretend_cuda`) are recorded and replayed by memory, not by name. Kernels are not: no Triton, no Inductor, no races of streams.

To C++ an `OnGpu` is a meta tensor, since autograd insists on a driver for anything else; Python sees its device.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pretend_cuda
import torch
from pretend_cuda import PretendedGenerator, with_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten._foreach_copy_)  # what may cross from one device to another
# Besides elementwise operations, these take a host's tensor without dimensions.
TAKE_SCALARS = (aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_put_, aten.index, aten._fused_adam_)
TAKE_HOST_INDICES = (aten.index, aten.index_put_, aten._index_put_impl_)
HOST_WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.repeat_interleave)


class Memory:
    """Stands for memory of a card: it lives as long as a tensor that shows it."""


_memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()  # by the address of the storage


class OnGpu(torch.Tensor):
    """A tensor on a pretended card; `elem` holds its numbers, `memory` is shared by all views of them."""

    elem: torch.Tensor
    memory: Memory
    device: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device):
        kind = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype, "device": "meta"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, elem.shape, **kind)
        tensor.elem, tensor.memory, tensor.card = elem, _memories.setdefault(address(elem), Memory()), device
        return tensor

    device = property(lambda self: self.card)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.elem!r} on {self.card}"

    def get_device(self) -> int:
        return self.card.index

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def address(elem: torch.Tensor) -> int:
    return elem.untyped_storage()._cdata


def dispatch(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation on tensors of cards, of the host, or of both where that is allowed."""
    leaves, spec = tree_flatten((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    asked = kwargs.get("device")
    number = function is aten.scalar_tensor.default
    if asked is not None and asked.type == "meta" and not ours and (_within or number):
        asked = kwargs["device"] = _within[-1] if _within else torch.device("cpu")
        leaves, spec = tree_flatten((args, kwargs))
    if not ours and (asked is None or asked.type != "cuda"):
        check_generator(leaves, torch.device("cpu"))
        return function(*args, **kwargs)
    target = ours[0].device if asked is None or asked.type == "meta" else with_index(asked)
    crossing = function.overloadpacket in COPIES
    if not crossing:
        check_devices(function, args, leaves, target)
    if target.type == "cuda":
        check_generator(leaves, target)
    graph = pretend_cuda.capturing()
    if graph is not None:
        on_host = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.device.type == "cpu"]
        indices = args[1] if function.overloadpacket in TAKE_HOST_INDICES else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if function.overloadpacket in HOST_WAITS or masked or (crossing and (on_host or target.type == "cpu")):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")
        if target != graph.device:
            raise RuntimeError(f"CUDA error: {function} on {target} is not in the capture, which is of {graph.device}")
    plain = [leaf.elem if isinstance(leaf, OnGpu) else leaf for leaf in leaves]

    def compute(plain: list[Any]) -> Any:
        plain_args, plain_kwargs = tree_unflatten(plain, spec)
        if asked is not None:
            plain_kwargs["device"] = torch.device("cpu")
        with pretend_cuda.own_random_numbers(function, plain, target):
            return function(*plain_args, **plain_kwargs)

    known = {id(leaf.elem): leaf for leaf in ours}
    result = compute(plain) if graph is None else graph.record(function, compute, ours, plain)

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or target.type != "cuda":
            return value
        if id(value) in known:
            if torch.Tag.inplace_view in function.tags:
                torch.Tensor.data.__set__(known[id(value)], OnGpu(value, target))
            assert value.shape == known[id(value)].shape, f"{function} changes a shape in place, which is not pretended"
            return known[id(value)]
        size = value.untyped_storage().nbytes()
        if size > pretend_cuda.limits.largest_tensor and address(value) not in _memories:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        return OnGpu(value, target)

    return tree_map(wrap, result)


def check_devices(function: Any, args: tuple, leaves: list[Any], target: torch.device) -> None:
    """What CUDA's kernels insist on: all tensors on one device."""
    packet = function.overloadpacket
    takes_scalars = torch.Tag.pointwise in function.tags or packet in TAKE_SCALARS
    indices = {id(index) for index in args[1]} if packet in TAKE_HOST_INDICES else set()
    for tensor in leaves:
        if not isinstance(tensor, torch.Tensor) or tensor.device == target:
            continue
        on_host = tensor.device.type == "cpu"
        if on_host and ((tensor.dim() == 0 and takes_scalars) or (id(tensor) in indices and pretend_cuda.capturing() is None)):
            continue
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {target} and {tensor.device}! "
            f"({function}, {tuple(tensor.shape)})"
        )


def check_generator(leaves: list[Any], target: torch.device) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator):
            generator = pretend_cuda.generators.get(leaf._cdata)
            device = leaf.device if generator is None else generator.device
            if leaf._cdata in pretend_cuda.lost_generators and pretend_cuda.capturing() is None:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            if device != target:
                raise RuntimeError(f"Expected a '{target}' device type for generator but found '{device}'")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What C++ decides before an operation is dispatched, and would decide by the meta tensor that it sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = with_index(kwargs["device"])
        if function in _SPECIAL:
            return _SPECIAL[function](function, *args, **kwargs)
        if not args or not isinstance(args[0], OnGpu):
            return function(*args, **kwargs)
        if function in _INDEXING:  # a list becomes a tensor on the host
            args = args[0], _from_lists(args[1]), *args[2:]
        # In `tensor[i] = 1.0` the number stays on the host.
        _within.append(torch.device("cpu") if function is torch.Tensor.__setitem__ else args[0].device)
        try:
            return function(*args, **kwargs)
        finally:
            _within.pop()


_INDEXING = torch.Tensor.__getitem__, torch.Tensor.__setitem__


def _from_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_from_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


_within: list[torch.device] = []  # where the functions that are under way put what they make beside their first argument


def _to(function: Callable, tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    device = with_index(device) or tensor.device
    dtype = dtype or tensor.dtype
    if device == tensor.device and isinstance(tensor, OnGpu):
        if dtype == tensor.dtype and layout is None:
            return tensor.clone() if copy else tensor
        device = torch.device("meta")
    kept = {} if layout is None else {"memory_format": layout}
    return torch.Tensor.to(tensor, device, dtype, non_blocking, copy, **kept)


def _cuda(function: Callable, tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **kept: Any) -> torch.Tensor:
    return _to(function, tensor, with_index("cuda" if device is None else device))


def _tensor(function: Callable, data: Any, *, device: torch.device | None = None, **kwargs: Any) -> torch.Tensor:
    if isinstance(data, OnGpu) and function is torch.as_tensor:
        return _to(function, data, device or data.device, kwargs.get("dtype") or data.dtype)
    if device is None or device.type != "cuda":
        return function(data, **kwargs, **({} if device is None else {"device": device}))
    requires_grad = kwargs.pop("requires_grad", False)
    return _to(function, function(data, **kwargs), device).requires_grad_(requires_grad)


def _no_numpy(function: Callable, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, OnGpu):
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first.")
    return function(tensor, *args, **kwargs)


def _tolist(function: Callable, tensor: torch.Tensor) -> Any:
    return function(tensor.cpu() if isinstance(tensor, OnGpu) else tensor)


def _get_data(function: Callable, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if isinstance(tensor, OnGpu) else function(tensor)


def _set_data(function: Callable, tensor: torch.Tensor, data: torch.Tensor) -> None:
    function(tensor, data)
    if isinstance(tensor, OnGpu):
        tensor.elem, tensor.memory, tensor.card = data.elem, data.memory, data.card


def _deepcopy(function: Callable, tensor: torch.Tensor, memo: dict) -> torch.Tensor:
    if not isinstance(tensor, OnGpu):
        return function(tensor, memo)
    if id(tensor) not in memo:
        with torch.no_grad():
            new = memo[id(tensor)] = tensor.clone().requires_grad_(tensor.requires_grad)
        new.grad = None if tensor.grad is None else copy.deepcopy(tensor.grad, memo)
        if isinstance(tensor, torch.nn.Parameter):
            new._is_param = True
    return memo[id(tensor)]


_SPECIAL: dict[Any, Callable] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.Tensor.numpy: _no_numpy,
    torch.Tensor.__array__: _no_numpy,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.data.__get__: _get_data,
    torch.Tensor.data.__set__: _set_data,
    torch.Tensor.__deepcopy__: _deepcopy,
}


def _move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`nn.Module._apply`, by which a moved parameter stays the object that it is, as it does on a real card."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


_apply = torch.nn.Module._apply


@contextlib.contextmanager
def pretend() -> Iterator[None]:
    """Let two cards seem to exist, in this thread."""
    with pretend_cuda.patched([(torch, "Generator", PretendedGenerator), (torch.nn.Module, "_apply", _move)]):
        with _Operations(), _Functions():
            yield
