"""The U-Net's blocks on the CPU in bfloat16: Winograd convolutions with everything around the matrix products fused.

    conv block   v = B^T x;  m[p] = v[p] u[p], p = 0 .. 9;  y = mish(group_norm(A^T m + bias)) (+ time bias) (+ residual)

Activations are [B, L, C] bfloat16, channels last: every matrix product runs over B ceil(L / 5) contiguous rows, in oneDNN
(AVX-512 bf16 or AMX where the processor has them) and against matrices that are laid out once for it (matrix_cpu.py). Five rows
need ten products, where the direct convolution needs 25. The transforms, the normalisation and the activation are
csrc/unet_cpu.cpp: one pass before and one after the products, where PyTorch's chain of operators makes a dozen over tensors of
twice the size. Sums and norms are float32.

Error: where rows are independent, 2.04 times the rounding of a direct convolution in bfloat16; the smoother the rows, the less
(csrc/unet_cpu.h: its points are the least sensitive of their kind). Rollouts stay within 2e-2 of float32
(tests/conformance.py --backend bf16).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dydiff.errors import DydiffError, NotForNetwork
from dydiff.kernels import native
from dydiff.kernels.matrix_cpu import ConstantMatrix
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.unet_reference import GROUPS, Weights

TAPS = 5
TILE = 5
REAL_POINTS = (1 / 3, 7 / 8, 8 / 5)  # with their negatives, +-i and infinity; as in csrc/unet_cpu.h

Packed = dict[str, Tensor | ConstantMatrix | list[ConstantMatrix]]


class CpuBlocks:
    """Blocks backend for CPU tensors; see `unet_reference.ReferenceBlocks` for the methods.

    Raises:
        DydiffError: the compiled part is missing (names how to build it); from `pack`, a kernel size other than 5.
    """

    def __init__(self) -> None:
        if reason := why_unavailable("cpu"):
            raise DydiffError(reason)
        self._native = native.extension.unet
        # Megabytes that are asked for anew come as untouched pages, and touching them costs more than the transforms do.
        self._scratch: dict[str, Tensor] = {}

    def pack(self, weights: Weights) -> Packed:
        """Filters of the blocks to a matrix for each point, other convolutions to matrices with their bias; the rest as float32."""
        weights = {name: value.detach().float().contiguous() for name, value in weights.items()}
        packed: Packed = {name: value for name, value in weights.items() if value.ndim == 1}
        for name, value in weights.items():
            bias = weights.get(name.removesuffix("weight") + "bias")
            if name.endswith("conv.weight"):
                packed[name] = [ConstantMatrix(point) for point in _transform_filter(value)]
            elif value.ndim == 3 and value.shape[2] == 4:
                packed[name] = [ConstantMatrix(taps, bias) for taps in _pair_taps(value)]
            elif name == "weight" and value.shape[2] == 1:  # the network's last, narrow product stays float32
                packed[name] = value[:, :, 0].T
            elif value.ndim == 3:
                packed[name] = ConstantMatrix(value.permute(2, 1, 0).flatten(0, 1), bias)
        return packed

    def enter(self, x: Tensor) -> Tensor:
        return x.bfloat16().contiguous()

    def residual_block(self, x: Tensor, skip: Tensor | None, packed: Packed, time_bias: Tensor) -> Tensor:
        hidden = self._conv_block(x, skip, packed, "block1.", time_bias, None)
        return self._conv_block(hidden, None, packed, "block2.", None, _residual(x, skip, packed))

    def downsample(self, x: Tensor, packed: Packed) -> Tensor:
        batch, length, channels = x.shape
        rows = F.pad(x, (0, 0, 1, 0)).as_strided(  # row i: x[2i - 1], x[2i], x[2i + 1]; the length is even here
            (batch, length // 2, 3 * channels), ((length + 1) * channels, 2 * channels, 1)
        )
        return _multiply(rows, packed["weight"])

    def upsample(self, x: Tensor, packed: Packed) -> Tensor:
        # Each output row takes two taps: y[2i] = x[i-1] w3 + x[i] w1 and y[2i+1] = x[i] w2 + x[i+1] w0.
        batch, length, channels = x.shape
        pairs = F.pad(x, (0, 0, 1, 1)).as_strided(  # row i: x[i - 1], x[i]
            (batch, length + 1, 2 * channels), ((length + 2) * channels, channels, 1)
        )
        even_taps, odd_taps = packed["weight"]
        even, odd = _multiply(pairs[:, :-1], even_taps), _multiply(pairs[:, 1:], odd_taps)
        return torch.stack([even, odd], dim=2).flatten(1, 2)

    def leave(self, x: Tensor, final_block: Packed, final_conv: Packed) -> Tensor:
        hidden = self._conv_block(x, None, final_block, "", None, None)
        return hidden.float() @ final_conv["weight"] + final_conv["bias"]

    def _conv_block(
        self,
        x: Tensor,
        skip: Tensor | None,
        packed: Packed,
        prefix: str,
        time_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        filters = packed[prefix + "conv.weight"]  # a [C_in, C_out] for each point
        batch, length, channels = x.shape
        skip_channels = 0 if skip is None else skip.shape[2]
        tiles = -(-length // TILE)
        threads = torch.get_num_threads()
        v = self._reuse("v", len(filters), batch * tiles, channels + skip_channels)
        sizes = batch, length, channels, skip_channels
        self._native.winograd_input(x.data_ptr(), _address(skip), v.data_ptr(), *sizes, threads)
        m = [matrix.multiply(rows) for matrix, rows in zip(filters, v, strict=True)]
        y = x.new_empty(batch, length, filters[0].shape[1])
        norm = [packed[prefix + name] for name in ("conv.bias", "norm.weight", "norm.bias")]
        points, *rest = [product.data_ptr() for product in m], *map(_address, (*norm, time_bias, residual, y))
        self._native.winograd_output(points, *rest, batch, length, y.shape[2], threads)
        return y

    def _reuse(self, name: str, *shape: int) -> Tensor:
        """An uninitialised bfloat16 tensor in the memory of the last one of this name; valid until the next call."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=torch.bfloat16)
        return self._scratch[name][:size].view(shape)


def _transform_filter(weight: Tensor) -> Tensor:
    """G w: [C_out, C_in, 5] -> [10, C_in, C_out] float64, the points in the order of csrc/unet_cpu.cpp."""
    if weight.shape[2] != TAPS or weight.shape[0] % GROUPS:
        raise NotForNetwork(
            f"The bf16 backend computes convolutions of {TAPS} taps over a multiple of {GROUPS} channels, not {weight.shape[2]} "
            f"taps over {weight.shape[0]} channels. Use --set sampler_kwargs.backend=extension."
        )
    rows = []
    for point in REAL_POINTS:
        # The derivative at the point of the polynomial whose roots all points are.
        slope = 2 * point * (point**2 + 1) * math.prod(point**2 - other**2 for other in REAL_POINTS if other != point)
        rows += [[sign * (sign * point) ** tap / slope for tap in range(TAPS)] for sign in (1, -1)]
    scale = math.prod(-1 - point**2 for point in REAL_POINTS)
    real, imaginary = [1 / scale, 0, -1 / scale, 0, 1 / scale], [0, 1 / scale, 0, -1 / scale, 0]  # of 1, i, -1, -i, 1
    rows += [real, [-x for x in imaginary], [x + y for x, y in zip(real, imaginary, strict=True)]]
    transform = torch.tensor([*rows, [0.0] * (TAPS - 1) + [1.0]], dtype=torch.float64)
    return torch.einsum("pk,oik->pio", transform, weight.double())


def _pair_taps(weight: Tensor) -> Tensor:
    """[C_in, C_out, 4] of a transposed convolution -> [2, 2 C_in, C_out]: the taps of even and of odd output rows."""
    taps = weight.permute(2, 0, 1)
    return torch.stack([torch.cat([taps[3], taps[1]]), torch.cat([taps[2], taps[0]])])


def _residual(x: Tensor, skip: Tensor | None, packed: Packed) -> Tensor:
    """The block's input, through its 1x1 convolution where the width changes."""
    if "residual.weight" not in packed:
        return x
    return _multiply(x if skip is None else torch.cat([x, skip], dim=2), packed["residual.weight"])


def _multiply(rows: Tensor, matrix: ConstantMatrix) -> Tensor:
    """rows [B, L, K] -> [B, L, N]."""
    return matrix.multiply(rows.reshape(-1, rows.shape[2])).view(*rows.shape[:2], -1)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

