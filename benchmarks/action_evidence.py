"""Does the diffusion model read earlier states out of later actions? What stands in the way of injecting another policy's actions.

    python benchmarks/action_evidence.py --outdir training-runs --dataset hopper-medium-v2 [--starts 128] [--json FILE]

A window's states up to row k follow from its first observation and its actions before row k; in a simulator, later actions cannot
change them. A diffusion model sees all actions of a window at once, and in its data they were chosen in view of the states: they
are evidence about them. So states are sampled (one pass, as in a rollout's first injection) given the data's own actions before row
k, and behind it:

    recorded     the data's own
    perturbed s  the same plus normal noise of standard deviation s, kept within [-1, 1]
    other        those of another window

Errors are those of rows 1 .. k against the simulator, root mean square of z-scored observations, means over the starts ± standard
errors. A causal model has the same error in every line; what it grows by is the price of injected actions that the data's policy
would not have taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from command_line import documented_parser, output_file, several, tells_errors
from machine import describe_machine
from torch import Tensor

from dydiff.checkpoint import write_atomically
from dydiff.device import find_device
from dydiff.diffusion.sampler import sample_edm
from dydiff.environments.simulate import roll_out_simulator, state_from_observation
from dydiff.errors import DydiffError
from dydiff.options import positive
from dydiff.options import seed as parse_seed
from dydiff.reports.comparison import draw_cases
from dydiff.reports.policy_runs import Subject, load_subject
from dydiff.reports.tables import format_table, plus_minus
from dydiff.reports.uncertainty import mean_with_error

NOISES = (0.1, 0.3)


def replace_later(action: Tensor, kept: int, seed: int) -> dict[str, Tensor]:
    """Actions [B, H, A] in policy space whose rows from `kept` on are replaced, by the name of what they are replaced with."""
    generator = torch.Generator(action.device).manual_seed(seed)
    noise = torch.randn(action.shape, generator=generator, device=action.device)
    replaced = {"recorded": action}
    replaced |= {f"perturbed {size}": (action + size * noise).clamp(-1, 1) for size in NOISES}
    replaced["other"] = action.roll(1, dims=0)
    return {name: torch.cat([action[:, :kept], later[:, kept:]], dim=1) for name, later in replaced.items()}


@torch.no_grad()
def measure(subject: Subject, starts: int, kept_rows: Sequence[int], seed: int) -> list[dict[str, object]]:
    """The errors of every kind of later actions and every number of actions that are kept.

    Raises:
        DydiffError: a number of kept actions that a window has not.
    """
    engine, problem = subject.rollouts.engine, subject.problem
    spaces = engine.spaces
    if wrong := [kept for kept in kept_rows if not 1 <= kept < engine.horizon]:
        raise DydiffError(f"--kept must lie between 1 and {engine.horizon - 1} (the horizon less one), not {wrong}.")
    cases = draw_cases(problem, engine.horizon, starts, seed)
    state = state_from_observation(problem.spec, cases.start)
    truth = roll_out_simulator(problem.spec, *state, engine.horizon, actions=cases.action)

    def load(raw: np.ndarray) -> Tensor:
        return torch.as_tensor(raw, dtype=torch.float32).to(spaces.device)

    true_rows = spaces.observation_raw_to_policy(load(truth.observation))
    first = spaces.observation_policy_to_model(spaces.observation_raw_to_policy(load(cases.start)))
    recorded = spaces.action_raw_to_policy(load(cases.action))
    going_on = torch.as_tensor(np.cumsum(truth.terminal, axis=1) - truth.terminal == 0).to(spaces.device)  # [B, H]
    lines = []
    for kept in kept_rows:
        for name, action in replace_later(recorded, kept, seed).items():
            generator = torch.Generator(spaces.device).manual_seed(seed)

            def draw(shape: tuple[int, ...], generator: torch.Generator = generator) -> Tensor:
                return torch.randn(shape, generator=generator, device=spaces.device)

            injected = spaces.action_policy_to_model(action)
            shape = (len(first), engine.horizon, first.shape[1] + injected.shape[2])
            sampled = sample_edm(engine.denoisers[0], shape, draw, first, injected, backend=engine.step_backend, **engine.sampler)
            rows = spaces.observation_model_to_policy(sampled[..., : spaces.observation_dim])
            errors = (rows - true_rows).square().mean(dim=-1).sqrt()[:, 1 : kept + 1]  # [B, k]
            counts = going_on[:, 1 : kept + 1].float()
            by_start = ((errors * counts).sum(dim=1) / counts.sum(dim=1).clamp_min(1))[counts.sum(dim=1) > 0]
            lines.append({"kept": kept, "later": name, "error": mean_with_error(by_start.double().cpu().numpy())})
    return lines


@tells_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--outdir", type=Path, default=Path("training-runs"), help="folder with the runs")
    parser.add_argument("--dataset", required=True, help="dataset that they were trained on")
    parser.add_argument("--starts", type=positive(int), default=128, help="windows")
    parser.add_argument("--kept", type=several(positive(int)), default=[1, 4, 16], help="actions that are kept (k)")
    parser.add_argument("--seed", type=parse_seed, default=0, help="of everything random")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ...; auto takes a GPU if there is one")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all numbers")
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    lines = measure(load_subject(options.outdir, options.dataset, device), options.starts, options.kept, options.seed)
    names = list(dict.fromkeys(line["later"] for line in lines))
    found = {(line["later"], line["kept"]): line["error"] for line in lines}
    rows = [[name, *(plus_minus(*found[name, kept].values(), 3) for kept in options.kept)] for name in names]
    print(format_table([["later actions", *(f"rows 1 .. {kept}" for kept in options.kept)], *rows]))
    if options.json:
        text = json.dumps({"machine": describe_machine(device), "lines": lines}, indent=1) + "\n"
        write_atomically(options.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    sys.exit(main())
