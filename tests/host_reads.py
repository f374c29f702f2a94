"""What cannot be captured in a CUDA graph, noticed on any device: operations that make the host wait for tensors' values."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense,  # .item(), float(tensor), if tensor:
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten._unique2,
    aten.repeat_interleave,
)


class NoHostReads(TorchDispatchMode):
    """Raises on every operation whose result, on a GPU, the host would have to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Up to PyTorch 2.11 quantile checks its fraction so, on a CPU alone.
        on_cpu_alone = function.overloadpacket is aten.equal and args[0].dim() == 0
        if function.overloadpacket in READS and not on_cpu_alone:
            raise AssertionError(f"{function} waits for the device")
        indices = args[1] if function.overloadpacket in (aten.index, aten.index_put_) else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise AssertionError(f"{function} with a mask waits for the device: the size of its result depends on values")
        return function(*args, **(kwargs or {}))
