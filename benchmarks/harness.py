"""Timing variants of one computation against each other: correctness first, then interleaved repetitions in one process.

A *case* is one computation on one set of inputs; its *variants* compute it in different ways. `race` checks every variant's
output against a trusted one on the very inputs that are timed, and stops the run if one is wrong. Then it repeats the
variants in turn, so that a change of the machine's speed meets all of them. Speed-ups are ratios of medians.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Largest relative error (2-norm) against the trusted output. "tf32": float32 with PyTorch's default TF32 convolutions.
LIMITS = {"float64": 1e-6, "float32": 1e-3, "tf32": 2e-2, "bfloat16": 2e-2, "float16": 2e-2}
BASELINE = "published"  # speed-ups are over this variant of the same case
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "avx_vnni")


class BenchmarkError(Exception):
    """The run cannot go on: a variant computes something else, or cannot run here."""


@dataclass
class Variant:
    """One way to compute a case.

    `run` computes everything and returns what is checked; `trusted` computes the same beyond doubt (it may be `run` itself).
    """

    name: str
    dtype: str  # of the matrix products, a key of LIMITS
    run: Callable[[], Tensor]
    trusted: Callable[[], Tensor]
    evaluations: int  # of the network
    flops: float  # of matrix products and convolutions, counted as direct ones
    detail: str = ""  # what else to know: which backend, compiled or not


@dataclass
class Case:
    """One computation on one set of inputs."""

    name: str
    batch: int
    horizon: int
    variants: list[Variant]
    note: str = ""  # what differs from the full computation
    tolerance: float = 1.0  # times LIMITS


@dataclass
class Measurement:
    """What came out for one variant."""

    variant: Variant
    error: float  # relative, against the trusted output
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Patience:
    """How long to time a variant: about `seconds`, but from `least` to `most` repetitions.

    With `warm_up` every variant is called once before the call that is checked. Without, whatever happens at a first call only
    must have happened before, in a smaller case; then, with `reuse`, a checked call of more than `seconds` counts itself.
    """

    seconds: float
    least: int
    most: int = 100
    warm_up: bool = False
    reuse: bool = False


def check_output(variant: Variant, output: Tensor, expected: Tensor, tolerance: float = 1.0) -> float:
    """The relative error |output - expected| / |expected| of a variant; `tolerance` multiplies its limit.

    Raises:
        BenchmarkError: the shapes differ, the output is not finite, or the error is above the limit of the variant's dtype.
    """
    if output.shape != expected.shape:
        raise BenchmarkError(f"Variant '{variant.name}' gives {list(output.shape)} instead of {list(expected.shape)}.")
    expected = expected.double()
    error = ((output.double() - expected).norm() / expected.norm()).item()
    limit = LIMITS[variant.dtype] * tolerance
    if not error <= limit:  # NaN fails
        raise BenchmarkError(
            f"Variant '{variant.name}' ({variant.dtype}) is wrong: relative error {error:.2e} against the trusted output, "
            f"limit {limit:.0e}. Its time means nothing."
        )
    return error


@torch.no_grad()
def race(case: Case, patience: Patience) -> list[Measurement]:
    """Check all variants of a case, then time them in turn.

    Raises:
        BenchmarkError: a variant's output is wrong.
    """
    # Trusted variants go first: their checked run is what the others are compared with.
    ordered = sorted(case.variants, key=lambda variant: variant.run != variant.trusted)
    expected: dict[Callable[[], Tensor], Tensor] = {}
    measurements, wanted = {}, {}
    for variant in ordered:
        if variant.trusted != variant.run and variant.trusted not in expected:
            expected[variant.trusted] = variant.trusted()
        if patience.warm_up:
            variant.run()
        seconds, output = time_call(variant.run)
        expected.setdefault(variant.run, output)
        measurement = Measurement(variant, check_output(variant, output, expected[variant.trusted], case.tolerance))
        measurements[variant.name] = measurement
        wanted[variant.name] = min(max(math.ceil(patience.seconds / seconds), patience.least), patience.most)
        if patience.reuse and seconds > patience.seconds:
            measurement.seconds, wanted[variant.name] = [seconds], 1
    expected.clear()
    for turn in range(max(wanted.values())):
        # Another one starts every round, so that nobody always follows the same neighbour.
        first = turn % len(ordered)
        for variant in ordered[first:] + ordered[:first]:
            measurement = measurements[variant.name]
            if len(measurement.seconds) < wanted[variant.name]:
                measurement.seconds.append(time_call(variant.run)[0])
    return [measurements[variant.name] for variant in case.variants]


def time_call(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds from the call until its result is complete, and the result."""
    on_gpu = torch.cuda.is_initialized()
    if not on_gpu:
        began = time.perf_counter()
        output = function()
        return time.perf_counter() - began, output
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    output = function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000, output


@torch.no_grad()
def measure_matrix_rate(dtype: str, device: str, size: int | None = None, seconds: float = 1.0) -> float:
    """FLOP/s of large square matrix products of a dtype, on this device at this moment: the median over about `seconds`."""
    size = size or (8192 if device.startswith("cuda") else 2048)
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(kind) for _ in range(2))
    tf32_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        for _ in range(3):
            shortest, _ = time_call(lambda: a @ b)
        samples = [time_call(lambda: a @ b)[0] for _ in range(min(max(int(seconds / shortest), 5), 1000))]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32_before
    return 2 * size**3 / statistics.median(samples)


def describe_machine(device: str) -> dict[str, Any]:
    """Where and with what the numbers were measured, for every line of the results."""
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_model(),
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    if device.startswith("cuda"):
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return machine


def make_lines(
    case: Case,
    measurements: Sequence[Measurement],
    machine: dict[str, Any],
    matrix_rates: dict[str, float],
    peaks: dict[str, int | None],
) -> list[dict[str, Any]]:
    """One flat record per variant: what --json writes and the table shows."""
    baseline = next((each.median for each in measurements if each.variant.name == BASELINE), None)
    return [
        {
            "case": case.name,
            "note": case.note,
            "variant": each.variant.name,
            "detail": each.variant.detail,
            "dtype": each.variant.dtype,
            "batch": case.batch,
            "horizon": case.horizon,
            "evaluations": each.variant.evaluations,
            "repeats": len(each.seconds),
            "median_s": each.median,
            "min_s": min(each.seconds),
            "max_s": max(each.seconds),
            "speedup": baseline / each.median if baseline else None,
            "tflops": each.variant.flops / each.median / 1e12,
            "matrix_tflops": matrix_rates[each.variant.dtype] / 1e12,
            "peak_bytes": peaks.get(each.variant.name),
            "error": each.error,
            "limit": LIMITS[each.variant.dtype] * case.tolerance,
            **machine,
        }
        for each in measurements
    ]


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append records to a file, one JSON object a line."""
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = _cpu_field("flags").split()
    return [flag for flag in CPU_FLAGS if flag in present]


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with a + if files differ from it."""
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _output_of("git", "status", "--porcelain") else "")


def _driver() -> str | None:
    return _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
