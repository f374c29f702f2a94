"""Where a rollout spends its time, with torch.profiler: for machines without Nsight.

    python profiling/torch_profile.py [--batch 32] [--horizon 100] [--backend auto] [--steps 4] [--trace FILE]

Uses the full-size network with random weights; `--steps` shortens the sampler, which repeats the same work. Prints the ranges and
the costliest operators; `--trace` writes a Chrome trace.
"""

from __future__ import annotations

import argparse
import os

os.environ["DYDIFF_RANGES"] = "1"  # before dydiff is imported

import torch
from torch.profiler import ProfilerActivity, profile

from dydiff.backends import prepare_denoiser
from dydiff.device import find_device
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.sampler import sample_edm
from dydiff.networks.unet import UNet

OBSERVATION_DIM, ACTION_DIM = 11, 3  # hopper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--horizon", type=int, default=100)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", default=None)
    options = parser.parse_args()
    device = find_device(options.device)
    width = OBSERVATION_DIM + ACTION_DIM
    denoiser = Denoiser(UNet(width, options.horizon), OBSERVATION_DIM).to(device).eval().requires_grad_(False)
    prepared = prepare_denoiser(denoiser, options.backend)
    shape = (options.batch, options.horizon, width)
    first = torch.zeros(options.batch, OBSERVATION_DIM, device=device)
    actions = torch.zeros(options.batch, options.horizon, ACTION_DIM, device=device)

    def work() -> None:
        sample_edm(prepared, shape, lambda size: torch.randn(size, device=device), first, actions, num_steps=options.steps)

    work()  # compiles, packs and fills caches
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with profile(activities=activities) as profiler:
        work()
    order = "self_cuda_time_total" if device != "cpu" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25))
    if options.trace:
        profiler.export_chrome_trace(options.trace)
        print(f"Trace: {options.trace}")


if __name__ == "__main__":
    main()
