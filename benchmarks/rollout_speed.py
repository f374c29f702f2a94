"""How fast is a rollout? dydiff's backends against published-style and the strongest stock PyTorch, side by side in one run.

    python benchmarks/rollout_speed.py --quick
    python benchmarks/rollout_speed.py --json speed.jsonl --plot speed.png
    python benchmarks/rollout_speed.py --batch 64,2048 --horizon 100 --variants published,stock,bf16,fast

Cases, on Hopper's dimensions (11 observations, 3 actions) and the full-size U-Net (58.75 M parameters) with random weights:

    evaluation   one evaluation of the network
    start        the autoregressive first guess: one step of the ensemble and the policy per row
    sampler      one pass of the sampler: 67 evaluations (fast: 8)
    rollout      everything: the start and two passes, 134 evaluations (fast: 11), never fewer

Variants: `published` and `stock` (baselines.py, stock.py), every backend of dydiff that works here (dydiff/backends), and
`fast`, the fastest of these in fast mode (dydiff/diffusion/fast_sampler.py), which samples other trajectories.

Every variant is first checked against float32 without TF32 on the very inputs that are timed (`fast`: against fast mode in
float32): relative error at most 2e-2 in 16 bit and TF32, 1e-3 in float32, and twice that for the network's raw output, of which
the sampler takes at most half. One above its limit is left out, and the run ends with status 1. Variants are then timed in
turn. The table shows medians, the range, the number of repetitions n, the speed-up over `published`, TFLOP/s (of direct
convolutions and matrix products, whatever the variant really does) and their share of what large square matrix products of the
same dtype reach, measured at the beginning of this run.

Peak memory is that of a process of its own, which builds the variant and runs all cases with few sampler steps (memory does
not depend on their number), weights and inputs included: torch.cuda.max_memory_allocated on a GPU; on a CPU the growth of the
resident set beyond what it was after the imports, the memory of torch.compile itself included. --no-memory skips it.

On a CPU that does not multiply bfloat16 `stock` is float32, and `bf16` must be asked for.

--quick: one shape, fewer repetitions, under 5 minutes on two cores. On a CPU, calls of more than 2 s then count from their
only run, the checked one (n = 1), the sampler case takes 5 of 34 steps and says so, and some variants must be asked for:
`extension` and `compiled`, where bfloat16 is multiplied `winograd`, else `stock`, which in float32 is nearly `published`. The
rollout is always complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from command_line import HORIZON, add_network_options, check_network, make_timing_parser, several, some_of
from harness import BenchmarkError, Case, Failures, Measurement, Patience, Session, Variant, run_benchmark
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from workload import NUM_STEPS, OURS, Ours, Runner, Shape, Workload, build_runner

from dydiff.device import has_fast_bf16
from dydiff.diffusion.fast_sampler import FastMode
from dydiff.errors import DydiffError
from dydiff.options import positive

CASES = ("evaluation", "start", "sampler", "rollout")
QUICK_STEPS = 5


def list_skipped(device: str, quick: bool) -> list[str]:
    """Variants that must be asked for on this device: those that cost minutes and stand near another one, and the hopeless."""
    if device.startswith("cuda"):
        return []
    near = ["extension", "compiled"] if quick else []
    if has_fast_bf16(torch.device(device)):
        return [*near, "winograd"] if quick else []
    return [*near, "stock", "bf16"] if quick else ["bf16"]


def choose_batch(device: str) -> int:
    """Starts of the one shape that is measured by default: on a CPU a rollout of these takes about a minute in float32."""
    if device.startswith("cuda"):
        return 64
    return 16 if has_fast_bf16(torch.device(device)) else 8


def without_tf32(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same in full float32."""

    def run() -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return function()

    return run


class Counts:
    """FLOPs of one trajectory, counted from the layers that run: per network evaluation, and of the autoregressive start."""

    def __init__(self, shape: Shape):
        runner = Ours(Workload(dataclasses.replace(shape, batch=1), "cpu"), "reference")
        self.evaluation, self.start = (self._count(run) for run in (runner.evaluation, runner.start))

    def of(self, runner: Runner, case: str) -> float:
        start = self.start if case in ("start", "rollout") else 0
        return runner.work.shape.batch * (runner.evaluations(case) * self.evaluation + start)

    @staticmethod
    def _count(run: Callable[[], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()


def make_case(name: str, work: Workload, runners: dict[str, Runner], counts: Counts) -> Case:
    """A case with all of its variants; fast mode is left out of what it does not change and of shortened passes."""
    shortened = name == "sampler" and work.sampler_steps != NUM_STEPS
    exact = without_tf32 if work.device.startswith("cuda") else lambda function: function
    reference = runners.get("reference") or Ours(work, "reference")
    trusted = {None: exact(getattr(reference, name))}  # by fast mode
    variants = []
    for label, runner in runners.items():
        if runner.fast is not None and (name in ("evaluation", "start") or shortened):
            continue
        if runner.fast not in trusted:
            trusted[runner.fast] = exact(getattr(Ours(work, "reference", runner.fast), name))
        variants.append(
            Variant(
                label,
                runner.dtype,
                getattr(runner, name),
                trusted[runner.fast],
                runner.evaluations(name),
                counts.of(runner, name),
                runner.detail,
            )
        )
    note = f"{work.sampler_steps} of {NUM_STEPS} steps" if shortened else ""
    # The sampler scales the network's raw output by c_out <= sigma_data before it counts.
    tolerance = 1 / work.denoiser.sigma_data if name == "evaluation" else 1.0
    return Case(name, work.shape.batch, work.shape.horizon, variants, note, tolerance)


def build_runners(names: Sequence[str] | None, work: Workload, skipped: Sequence[str], failures: Failures) -> dict[str, Runner]:
    """The variants asked for (but `fast`, which waits for a backend), or all that work here; names those that do not.

    `skipped` are left out unless asked for.
    """
    runners: dict[str, Runner] = {}
    for name in names or [name for name in ("published", "stock", *OURS) if name not in skipped]:
        if name == "fast":
            continue
        with failures.attempt(name):
            try:
                runners[name] = build_runner(name, work, FastMode())
            except DydiffError as error:
                if names:
                    raise
                print(f"Variant {name} is left out: {error}")
    return runners


def fastest_backend(measurements: Sequence[Measurement]) -> str:
    """dydiff's backend with the shortest network evaluation; `auto` if none was measured."""
    ours = [each for each in measurements if each.variant.name in OURS]
    return min(ours, key=lambda each: each.median).variant.name if ours else "auto"


def measure(session: Session) -> None:
    """Measure the cases of all shapes."""
    for shape in list_shapes(session.options):
        run_shape(shape, session)


def run_shape(shape: Shape, session: Session) -> None:
    """Measure the cases of one shape."""
    torch.compiler.reset()  # or its limit on recompilations would send later shapes to eager
    options, device = session.options, session.options.device
    shorten = options.quick and not device.startswith("cuda")
    thorough = Patience(options.seconds, least=1 if shorten else 3, warm_up=True)
    # Rollouts that take long are not repeated in haste; on a CPU a second one is too dear to warm up, and the network's evaluation
    # has done it.
    patience = dataclasses.replace(thorough, warm_up=device.startswith("cuda"), reuse=options.quick)
    work = Workload(shape, device, sampler_steps=QUICK_STEPS if shorten else NUM_STEPS)
    runners = build_runners(options.variants, work, list_skipped(device, options.quick), session.failures)
    counts, peaks = Counts(shape), {}
    for name in CASES:
        if name != "evaluation" and name not in options.cases:
            continue
        case = make_case(name, work, runners, counts)
        measurements = session.race(case, thorough if name == "evaluation" else patience)
        for failed in {variant.name for variant in case.variants} - {each.variant.name for each in measurements}:
            del runners[failed]
        if name == "evaluation":
            if not options.variants or "fast" in options.variants:
                with session.failures.attempt("fast"):
                    runners["fast"] = build_runner(f"fast:{fastest_backend(measurements)}", work, FastMode())
            for label, runner in () if options.no_memory else runners.items():
                with session.failures.attempt(f"memory of {label}"):
                    peaks[label] = measure_peak(label, runner, device)
        if name in options.cases:
            session.record(case, measurements, peaks)


def measure_peak(label: str, runner: Runner, device: str) -> int:
    """Peak memory in bytes of a process of its own that builds a variant and runs every case.

    Raises:
        BenchmarkError: that process fails.
    """
    name = f"fast:{runner.backend}" if label == "fast" else label
    options = {"peak-memory-of": name, "device": device, **dataclasses.asdict(runner.work.shape)}
    options["dim-mults"] = ",".join(map(str, options.pop("dim_mults")))
    arguments = [f"--{option}={value}" for option, value in options.items()]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"The process that measures the memory of '{name}' failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def peak_memory(name: str, shape: Shape, device: str) -> int:
    """The same, of this very process."""
    on_gpu = device.startswith("cuda")
    if not on_gpu:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _resident("VmRSS")
    runner = build_runner(name, Workload(shape, device, num_steps=2, sampler_steps=2), FastMode(2, 0.8, 2))
    for case in CASES:
        getattr(runner, case)()
    return torch.cuda.max_memory_allocated(device) if on_gpu else _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS is the resident set, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def list_shapes(options: argparse.Namespace) -> list[Shape]:
    """All combinations of --batch and --horizon if either is given; otherwise a sweep of each with the other one held."""
    on_gpu = options.device.startswith("cuda")
    batches, horizons = options.batch or [choose_batch(options.device)], options.horizon or [HORIZON]
    pairs = [(batch, horizon) for horizon in horizons for batch in batches]
    if not (options.batch or options.horizon or options.quick):
        batches, held = ([16, 64, 256, 1024, 2048], 256) if on_gpu else ([16, 64], 16)
        pairs = [(batch, HORIZON) for batch in batches] + [(held, horizon) for horizon in (32, 64, 256)]
    return [Shape(batch, horizon, options.dim, tuple(options.dim_mults)) for batch, horizon in pairs]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_timing_parser(__doc__, quick="one shape and few repetitions")
    names = ("published", "stock", *OURS, "fast")
    parser.add_argument("--batch", type=several(positive(int)), help="start states, such as 16,256,2048")
    parser.add_argument("--horizon", type=several(positive(int)), help="rows, such as 32,100,256")
    parser.add_argument("--variants", type=some_of(names), help=f"some of {','.join(names)} (default: all that work here)")
    parser.add_argument("--cases", type=some_of(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    add_network_options(parser)
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_network(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.peak_memory_of:  # in a process that `measure_peak` started
        print(peak_memory(options.peak_memory_of, list_shapes(options)[0], options.device))
        return 0
    return run_benchmark(options, measure)


if __name__ == "__main__":
    sys.exit(main())
