"""How fast are an agent's updates and its replay? dydiff's modes against published-style and tuned stock PyTorch, in one run.

    python benchmarks/updates_speed.py --quick
    python benchmarks/updates_speed.py --json speed.jsonl --plot speed.png
    python benchmarks/updates_speed.py --cases td3bc,diffusion_ql --variants published,compiled

Cases, on Hopper's dimensions (11 observations, 3 actions), networks 2 x 256, batches of 256 of which 153 are real:

    td3bc, diffusion_ql, cql   updates: draw the batch from replay, draw the noise, all gradient steps, targets, what is logged
    four_seeds                 TD3+BC's for four seeds, one after the other or together
    replay_insert              append the 1,228 x 99 transitions of a rollout

Variants: `published` and `stock` (benchmarks/update_baselines.py), dydiff's modes `eager`, `compiled` and, on a GPU, `graph`
(dydiff/updates.py), and `bf16`, the fastest of these with `update_precision: bf16`. Before anything is timed, every variant
makes four updates on the same batches and noise; if what these change in the weights differs from the plainest variant's
(`error` in the table), it is left out, and the run ends with status 1. Times are of one call, which makes as many updates as
the note says. FLOPs are those of the matrix products of dydiff's own updates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from command_line import make_timing_parser, some_of
from harness import Case, Failures, Patience, Session, Variant, check_output, run_benchmark
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from update_baselines import BASELINES, Replay, sample_published

from dydiff.agents import AGENTS
from dydiff.capture import can_compile
from dydiff.data import Transitions
from dydiff.replay import ReplayBuffer, sample_mixed
from dydiff.updates import WORTH_COMPILING, Updates

OBSERVATION_DIM, ACTION_DIM, BATCH, NUM_REAL, REAL_RATIO = 11, 3, 256, 153, 0.6
TRANSITIONS = 1228 * 99  # of one rollout: 60 % of 2048 trajectories of 100 rows
AGENTS_OF = {"td3bc": "td3_bc", "diffusion_ql": "diffusion_ql", "cql": "cql"}
UPDATES_A_CALL = {"td3bc": 50, "diffusion_ql": 20, "cql": 4}
CASES = (*AGENTS_OF, "four_seeds", "replay_insert")
SEEDS = 4
VARIANTS = ("published", "stock", "eager", "compiled", "graph", "bf16")
CHECKED_UPDATES = 4
TOLERANCE = 15.0  # times the limit: Adam's first steps are the sign of a gradient, rounding or not


def make_transitions(count: int, device: str, seed: int) -> Transitions:
    """Made-up transitions in policy space."""
    generator = torch.Generator().manual_seed(seed)
    widths = ((OBSERVATION_DIM,), (ACTION_DIM,), (), (OBSERVATION_DIM,), ())
    fields = Transitions(*(torch.randn((count, *width), generator=generator) for width in widths))
    fields = fields._replace(action=fields.action.tanh(), terminal=(fields.terminal > 2).float())
    return Transitions(*(field.to(device) for field in fields))


def find_mode(variant: str) -> tuple[str, int, str]:
    """Mode, number of updates and precision of one of dydiff's variants, as `Updates` takes them."""
    if variant == "bf16":
        return "auto", WORTH_COMPILING, "bf16"
    return variant, 0, "float32"


def find_dtype(variant: str) -> str:
    """The dtype of a variant's matrix products."""
    return "bfloat16" if variant == "bf16" else "float32"


class Runner:
    """A variant's agent with its replay: `updates` makes a call's updates, `changes` are those of the check."""

    def __init__(self, case: str, variant: str, device: str):
        self.count = UPDATES_A_CALL[case]
        name = AGENTS_OF[case]
        sizes = (OBSERVATION_DIM, ACTION_DIM)
        self.agent = AGENTS[name](*sizes, device=device, generator=torch.Generator().manual_seed(0))
        self.real, self.synthetic = (make_transitions(TRANSITIONS, device, seed) for seed in (1, 2))
        if variant == "published":
            self.replay = [Replay(TRANSITIONS, *sizes, device) for _ in range(2)]
            for replay, transitions in zip(self.replay, (self.real, self.synthetic), strict=True):
                for stored, field in zip(replay.fields, transitions, strict=True):
                    stored[:] = field.cpu().numpy().reshape(TRANSITIONS, -1)
                replay.size = TRANSITIONS
        else:
            self.replay = [ReplayBuffer.from_transitions(each, TRANSITIONS) for each in (self.real, self.synthetic)]
        self.generator = torch.Generator(device).manual_seed(3)
        if variant in ("published", "stock"):
            self.baseline = BASELINES[name](*sizes, tuned=variant == "stock", device=device)
            self.baseline.load(self.agent)
            self.apply = self._apply_baseline
            self.updates = self._loop_published if variant == "published" else self._loop_stock
        else:
            self.baseline = None
            how = BATCH, REAL_RATIO, self.generator, *find_mode(variant)
            self.runs = Updates(self.agent, *self.replay, *how)
            self.apply = self._apply_ours
            self.updates = self._run_ours

    def _loop_published(self) -> Tensor:
        for _ in range(self.count):
            self.baseline.update(sample_published(*self.replay, BATCH, NUM_REAL))
        return torch.ones(1)

    def _loop_stock(self) -> Tensor:
        for _ in range(self.count):
            log = self.baseline.update(sample_mixed(*self.replay, BATCH, NUM_REAL, self.generator))
        return torch.ones_like(next(iter(log.values()))).reshape(1)

    def _run_ours(self) -> Tensor:
        self.runs.run(self.count)
        return torch.ones(1)

    def _apply_baseline(self, draws: list[tuple[Transitions, tuple]]) -> None:
        for batch, noise in draws:
            self.baseline.update(batch, noise)

    def _apply_ours(self, draws: list[tuple[Transitions, tuple]]) -> None:
        draws = [(torch.cat([field.view(BATCH, -1) for field in batch], dim=1), noise) for batch, noise in draws]
        for first in range(0, len(draws), self.runs.at_once):
            some = draws[first : first + self.runs.at_once]
            self.runs._apply(self.runs._advance(len(some)), some)

    def weights(self) -> Tensor:
        """Both critics' and the policy's."""
        owner = self.baseline or self.agent
        if self.baseline is None:
            trees = [self.agent.critics.member_state_dict(i) for i in (0, 1)]
        else:
            trees = [critic.state_dict() for critic in owner.critics]
        trees.append((owner.actor if hasattr(owner, "actor") else owner.policy).state_dict())
        return torch.cat([weight.flatten() for tree in trees for weight in tree.values()])

    def changes(self) -> Tensor:
        """What the first updates change the weights by, on batches and noise that are the same for all variants."""
        before = self.weights()
        generator = torch.Generator(self.agent.device).manual_seed(4)
        buffers = [ReplayBuffer.from_transitions(each, TRANSITIONS) for each in (self.real, self.synthetic)]
        draws = []
        for _ in range(CHECKED_UPDATES):
            batch = sample_mixed(*buffers, BATCH, NUM_REAL, generator)
            draws.append((batch, self.agent.draw_noise(BATCH, generator)))
        self.apply(draws)
        return self.weights() - before


def make_update_case(name: str, variants: Sequence[str], device: str, failures: Failures) -> tuple[Case, dict[str, float]]:
    """A case of updates with those of its variants that are right, and their errors."""
    with torch.enable_grad():
        plain = Runner(name, "eager", device)
        with FlopCounterMode(display=False) as counter:
            expected = plain.changes()
        flops = counter.get_total_flops() / CHECKED_UPDATES
        made, errors = [], {}
        for label in variants:
            with failures.attempt(f"{label} in {name}"):
                runner = Runner(name, label, device)
                run = torch.enable_grad()(runner.updates)
                variant = Variant(label, find_dtype(label), run, run, runner.count, runner.count * flops)
                errors[label] = check_output(variant, runner.changes(), expected, TOLERANCE)
                made.append(variant)
    return Case(name, BATCH, 1, made, f"{UPDATES_A_CALL[name]} updates a call", TOLERANCE), errors


def make_insert_case(variants: Sequence[str], device: str) -> Case:
    """Appending a rollout's transitions: row by row, or at once; what is stored is checked."""
    new = make_transitions(TRANSITIONS, device, 5)
    sizes = (OBSERVATION_DIM, ACTION_DIM, device)
    rows, ours = Replay(2 * TRANSITIONS, *sizes), ReplayBuffer(2 * TRANSITIONS, *sizes)

    def append_rows() -> Tensor:
        first = rows.top
        rows.extend(new)
        return torch.from_numpy(rows.fields.observation[first : first + TRANSITIONS])

    def append_at_once() -> Tensor:
        first = ours.position
        ours.extend(new)
        return ours.storage.observation[first : first + TRANSITIONS].cpu()

    def trusted() -> Tensor:
        return new.observation.cpu()

    runs: dict[str, Callable[[], Tensor]] = {"published": append_rows, "ours": append_at_once}
    chosen = ["published"] * ("published" in variants) + ["ours"]
    made = [Variant(label, "float32", runs[label], trusted, 1, 0.0) for label in chosen]
    return Case("replay_insert", TRANSITIONS, 1, made, "1,228 x 99 transitions")


def make_seeds_case(variants: Sequence[str], device: str, failures: Failures) -> Case:
    """TD3+BC of four seeds, each for itself or all together; the means of a loss are compared."""
    made = []
    for mode in [name for name in variants if name not in ("published", "stock")]:
        parts = {}
        with failures.attempt(f"{mode} in four_seeds"):
            alone, together = ([Runner("td3bc", mode, device).runs for _ in range(SEEDS)] for _ in range(2))
            parts = {"alone": alone, "together": [Updates.together(together)]}

        def run(group: Sequence[Updates]) -> Tensor:
            figures = [each for updates in group for each in updates.run_all(UPDATES_A_CALL["td3bc"])]
            return torch.tensor([each["critic_loss"] for each in figures])

        runs = {name: torch.enable_grad()(partial(run, group)) for name, group in parts.items()}
        count = SEEDS * UPDATES_A_CALL["td3bc"]
        made += [Variant(f"{mode}, {name}", find_dtype(mode), runs[name], runs["alone"], count, 0.0) for name in runs]
    return Case("four_seeds", BATCH, 1, made, f"{UPDATES_A_CALL['td3bc']} updates a seed and call", TOLERANCE)


def measure(session: Session) -> None:
    """Check and measure all cases."""
    variants = find_variants(session.options)
    for name in session.options.cases:
        run_case(name, variants, session)


def run_case(name: str, variants: Sequence[str], session: Session) -> None:
    """Check and measure one case."""
    torch.compiler.reset()
    errors: dict[str, float] = {}
    if name == "replay_insert":
        case = make_insert_case(variants, session.options.device)
    elif name == "four_seeds":
        case = make_seeds_case(variants, session.options.device, session.failures)
    else:
        case, errors = make_update_case(name, variants, session.options.device, session.failures)
    measurements = session.race(case, Patience(session.options.seconds, least=3, warm_up=True))
    for measurement in measurements:
        measurement.error = errors.get(measurement.variant.name, measurement.error)
    session.record(case, measurements)


def find_variants(options: argparse.Namespace) -> list[str]:
    """The variants asked for, or all that can run here."""
    device = torch.device(options.device)
    fast = ["compiled"] * can_compile(device) + ["graph"] * (device.type == "cuda")
    possible = [*VARIANTS[:3], *fast, *["bf16"] * bool(fast)]
    return options.variants or possible


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_timing_parser(__doc__, quick="few repetitions")
    parser.add_argument("--cases", type=some_of(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    variants = f"some of {','.join(VARIANTS)} (default: all that work here)"
    parser.add_argument("--variants", type=some_of(VARIANTS), help=variants)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(parse_arguments(arguments), measure)


if __name__ == "__main__":
    sys.exit(main())
