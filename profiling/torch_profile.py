"""Where a rollout spends its time, with torch.profiler: for machines without Nsight.

    python profiling/torch_profile.py [--batch 32] [--horizon 100] [--backend auto] [--steps 4] [--trace FILE]

Rolls out with full-size models of random weights, uncaptured, so that its ranges show; `--steps` shortens the sampler, which
repeats the same work. Prints the ranges and the costliest operators; `--trace` writes a Chrome trace.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DYDIFF_RANGES"] = "1"  # before dydiff is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from command_line import (  # noqa: E402 - found only now
    FULL_SIZE,
    HORIZON,
    check_network,
    documented_parser,
    one_of,
    output_file,
    tells_errors,
)
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from workload import Ours, Shape, Workload  # noqa: E402

from dydiff.backends import BACKENDS  # noqa: E402
from dydiff.device import find_device  # noqa: E402
from dydiff.options import positive  # noqa: E402


@tells_errors
def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--batch", type=positive(int), default=32)
    parser.add_argument("--horizon", type=positive(int), default=HORIZON)
    parser.add_argument("--backend", type=one_of(BACKENDS), default="auto")
    parser.add_argument("--steps", type=positive(int), default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", type=output_file)
    options = parser.parse_args()
    check_network(parser, options)
    device = find_device(options.device)
    shape = Shape(options.batch, options.horizon, *FULL_SIZE)
    rollout = Ours(Workload(shape, device, num_steps=options.steps), options.backend)
    rollout.engine.capture = False
    rollout.rollout()  # compiles, packs and fills caches
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities) as profiler:
        rollout.rollout()
    order = "self_cuda_time_total" if device != "cpu" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25))
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
        print(f"Trace: {options.trace}")


if __name__ == "__main__":
    sys.exit(main())
