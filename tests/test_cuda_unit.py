"""The sampler step's CUDA unit without a GPU: its kernels as plain C++, every thread of a grid in turn, against the CPU unit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# What the unit takes from CUDA. A launch is a loop over all threads, and the stream is the place where it leaves the grid's size.
RUNTIME = """
#include <cstdint>
#define __global__
struct Index { uint32_t x; };
inline Index blockIdx, threadIdx;
typedef uint32_t* cudaStream_t;
enum cudaError_t { cudaSuccess };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 1, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads, int, cudaStream_t stream, Arguments... arguments) {
    *stream = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
    }
}
"""

# Both units on the same numbers: [B, H, D] of a size that no block divides, and of one that a block divides.
COMPARE = """
import ctypes
import itertools
import os
import sys
import torch

sys.setdlopenflags(os.RTLD_LAZY)  # the other CPU units are not linked
sys.path.insert(0, sys.argv[1])
import _native

GUARD = 8
blocks = ctypes.c_uint32()
stream = ctypes.addressof(blocks)


def outputs(unit, name, inputs, count, size, *arguments):
    buffers = [torch.full((size + 2 * GUARD,), torch.nan) for _ in range(count)]
    addresses = [x if x is None or isinstance(x, int) else x.data_ptr() for x in inputs]
    written = [buffer[GUARD:].data_ptr() for buffer in buffers]
    getattr(unit, name)(*addresses, *written, *arguments, *([stream] if unit is _native.cuda else []))
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), (name, "writes where it must not")
        assert buffer[GUARD:-GUARD].isfinite().all(), (name, "leaves elements out")
    return buffers


compared = 0
for batch, horizon, observation_dim, action_dim in ((1, 1, 2, 1), (3, 5, 11, 3), (4, 16, 11, 5), (3, 100, 17, 6)):
    rows, width = batch * horizon, observation_dim + action_dim
    size = rows * width
    x, noise, network = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    state = torch.tensor([2**40 + 7, 3])
    first, actions = torch.randn(batch, observation_dim), torch.randn(rows, action_dim)
    cases = [("churn", (x, noise), 2, size, 0.9, 1.2, 1.002, 0.5), ("churn_philox", (x, state, 19), 2, size, 0.9, 1.2, 1.002, 0.5)]
    for condition in itertools.product((0, first.data_ptr()), (0, actions.data_ptr())):
        parts = *condition, horizon, observation_dim, action_dim
        cases += [("euler", (x, network), 2, rows, 1.2, 0.7, 0.5, *parts)]
        cases += [("heun", (x, noise, network), 1, rows, 1.2, 0.7, 0.5, *parts)]
    for name, inputs, count, *arguments in cases:
        on_cpu, on_cuda = (outputs(unit, name, inputs, count, size, *arguments) for unit in (_native.cpu, _native.cuda))
        threads = -(-size // 4) if name == "churn_philox" else size
        assert blocks.value == -(-threads // 256), (name, blocks.value)
        for one, other in zip(on_cpu, on_cuda):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, equal_nan=True)
            compared += 1
    last = [torch.empty(size) for _ in range(2)]  # the last step has no network input: its address is 0
    for unit, result in zip((_native.cpu, _native.cuda), last):
        end = [stream] if unit is _native.cuda else []
        unit.euler(x.data_ptr(), network.data_ptr(), result.data_ptr(), 0, rows, 0.002, 0.0, 0.5, *parts, *end)
    torch.testing.assert_close(last[1], last[0], rtol=1e-6, atol=1e-6)
assert _native.cuda.obstacle(-1) == ""
blocks.value = 77
_native.cuda.churn(0, 0, 0, 0, 0, 0.9, 1.2, 1.002, 0.5, stream)
assert blocks.value == 77, "nothing is launched for no elements"
print(compared)
"""


def test_every_thread_computes_what_the_cpu_unit_does(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    unit = (CSRC / "edm_step_cuda.cu").read_text()
    launches = re.compile(r"(\w+)<<<(.*?)>>>\((.*?)\);")
    assert len(launches.findall(unit)) == unit.count("<<<") == 1
    (tmp_path / "unit.cpp").write_text(launches.sub(r"run(\1, \2, \3);", unit))
    library = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [f"-I{folder}" for folder in (tmp_path, CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [CSRC / "bindings.cpp", CSRC / "edm_step_cpu.cpp", tmp_path / "unit.cpp"]
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-DDYDIFF_WITH_CUDA", "-fvisibility=hidden"]
    for command in ([compiler, *flags, *folders, "-o", library, *sources], [sys.executable, "-c", COMPARE, tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 4 * (4 + 4 * 3)
