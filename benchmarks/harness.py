"""Timing variants of one computation against each other: correctness first, then interleaved repetitions in one process.

A *case* is one computation on one set of inputs; its *variants* compute it in different ways. `race` checks every variant's
output against a trusted one on the very inputs that are timed. Then it repeats the variants in turn, so that a change of the
machine's speed meets all of them. Speed-ups are ratios of medians. A variant that is wrong or fails has no time: a benchmark goes
on without it, and ends with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command_line import describe_size, tells_errors
from machine import describe_machine
from results import draw, table_header, table_rows
from torch import Tensor

from dydiff.device import find_device
from dydiff.errors import DydiffError

# Largest relative error (2-norm) against the trusted output. "tf32": float32 with PyTorch's default TF32 convolutions.
LIMITS = {"float64": 1e-6, "float32": 1e-3, "tf32": 2e-2, "bfloat16": 2e-2, "float16": 2e-2}
BASELINE = "published"  # speed-ups are over this variant of the same case


class BenchmarkError(DydiffError):
    """A variant computes something else or cannot run here, or no variant is left."""


class Failures:
    """What went wrong in a run that went on without it."""

    def __init__(self):
        self.told: list[str] = []

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note what fails within, as `what`, and go on behind it."""
        try:
            yield
        except Exception as error:  # whatever a kernel, a compiler or a library raises
            text = str(error) if isinstance(error, DydiffError) else f"{type(error).__name__}: {error}"
            self.told.append(f"{what}: {text.strip()}")
            print(f"error: {self.told[-1]}", file=sys.stderr, flush=True)

    def status(self) -> int:
        """The exit status of the run, whose last words they are."""
        if self.told:
            print(
                f"error: {len(self.told)} failed, see above: {', '.join(each.partition(':')[0] for each in self.told)}",
                file=sys.stderr,
            )
        return 1 if self.told else 0


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
def race(case: Case, patience: Patience, failures: Failures) -> list[Measurement]:
    """Check all variants of a case, then time those that are right in turn.

    Raises:
        BenchmarkError: none is.
    """
    # Trusted variants go first: their checked run is what the others are compared with.
    ordered = sorted(case.variants, key=lambda variant: variant.run != variant.trusted)
    expected: dict[Callable[[], Tensor], Tensor] = {}
    measurements, wanted = {}, {}
    for variant in ordered:
        with failures.attempt(f"{variant.name} in {case.name} of batch {case.batch}, horizon {case.horizon}"):
            if variant.trusted != variant.run and variant.trusted not in expected:
                expected[variant.trusted] = variant.trusted()
            if patience.warm_up:
                variant.run()
            seconds, output = time_call(variant.run)
            expected.setdefault(variant.run, output)
            measurement = Measurement(variant, check_output(variant, output, expected[variant.trusted], case.tolerance))
            wanted[variant.name] = min(max(math.ceil(patience.seconds / seconds), patience.least), patience.most)
            if patience.reuse and seconds > patience.seconds:
                measurement.seconds, wanted[variant.name] = [seconds], 1
            measurements[variant.name] = measurement
    expected.clear()
    if not measurements:
        raise BenchmarkError(f"No variant of {case.name} is right.")
    ordered = [variant for variant in ordered if variant.name in measurements]
    for turn in range(max(wanted.values())):
        # Another one starts every round, so that nobody always follows the same neighbour.
        first = turn % len(ordered)
        for variant in ordered[first:] + ordered[:first]:
            measurement = measurements[variant.name]
            if len(measurement.seconds) < wanted[variant.name]:
                measurement.seconds.append(time_call(variant.run)[0])
    return [measurements[variant.name] for variant in case.variants if variant.name in measurements]


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


class Session:
    """One run of a benchmark: what its cases share, and the records so far. Needs the options of `make_timing_parser`."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.machine = describe_machine(options.device)
        self.rates: dict[str, float] = {}  # FLOP/s of large matrix products by dtype, measured when first needed
        self.records: list[dict[str, Any]] = []
        self.failures = Failures()

    def race(self, case: Case, patience: Patience) -> list[Measurement]:
        """`race`, after measuring the matrix rates that the case's figures are compared with."""
        for dtype in sorted({variant.dtype for variant in case.variants} - self.rates.keys()):
            self.rates[dtype] = measure_matrix_rate(dtype, self.options.device)
        return race(case, patience, self.failures)

    def record(
        self,
        case: Case,
        measurements: Sequence[Measurement],
        peaks: dict[str, int | None] | None = None,
        extra: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Print a case's lines, and append them to --json with what is `extra` to know of each variant."""
        case = dataclasses.replace(case, note="; ".join(filter(None, [case.note, describe_size(self.options)])))
        lines = make_lines(case, measurements, self.machine, self.rates, peaks or {})
        print(table_rows(lines), flush=True)
        lines = [line | (extra or {}).get(line["variant"], {}) for line in lines]
        if self.options.json:
            append_lines(self.options.json, lines)
        self.records += lines


@tells_errors
def run_benchmark(options: argparse.Namespace, measure: Callable[[Session], None]) -> int:
    """Find the device, let `measure` measure, show what it found; returns the exit status."""
    options.device = find_device(options.device)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)  # events are recorded on the current one
    options.seconds = options.seconds or (2.0 if options.quick else 10.0)
    session = Session(options)
    print(", ".join(f"{name} {value}" for name, value in session.machine.items()))
    print(table_header())
    try:
        measure(session)
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in session.rates.items())
        print(f"Large matrix products: {rates}")
    finally:  # whatever ends it, what was measured is drawn
        if options.plot and session.records:
            draw(session.records, options.plot)
    return session.failures.status()
