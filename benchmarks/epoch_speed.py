"""How fast is a whole epoch of policy training, and where does its time go? dydiff against published style, in one run.

    python benchmarks/epoch_speed.py --quick
    python benchmarks/epoch_speed.py --json speed.jsonl --plot speed.png
    python benchmarks/epoch_speed.py --cases epoch --starts 64 --variants published,beside

Cases:

    evaluation   ten episodes of halfcheetah: one environment at a time, or all in lockstep with one policy call a step
    epoch        TD3+BC on Hopper: a rollout with the full-size U-Net (58.75 M parameters), scores, filter, transitions into
                 replay, 500 updates, evaluation

Variants of `epoch`: `published` (benchmarks/baselines.py, benchmarks/update_baselines.py); `ours` evaluates in the training
process, `beside` in a worker while the next epoch trains. A call is three epochs and ends when the last evaluation has: of
`beside`, all but that one are hidden if a core is to spare. Below the table stands each variant's time an epoch by part; what
`beside` shows as evaluation is waiting. What the parts compute is checked by updates_speed.py and rollout_speed.py, and the
returns of `evaluation` here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from command_line import HORIZON, add_network_options, check_network, make_timing_parser, some_of
from harness import Case, Failures, Patience, Session, Variant, run_benchmark
from results import show_seconds
from torch import Tensor
from update_baselines import TD3BC as PublishedTD3BC
from update_baselines import Replay, sample_published
from updates_speed import ACTION_DIM, BATCH, NUM_REAL, OBSERVATION_DIM, REAL_RATIO, make_transitions
from workload import NUM_STEPS, Ours, Published, Shape, Workload

from dydiff.agents import AGENTS
from dydiff.environments import EnvironmentSpec, environment_spec
from dydiff.environments.terminal import terminal_function
from dydiff.evaluate import Evaluator, episode_seed
from dydiff.evaluation_worker import EvaluationWorker, PolicyEvaluator, describe_evaluation
from dydiff.filters import keep_mask
from dydiff.models import in_raw_space
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.options import positive
from dydiff.replay import ReplayBuffer
from dydiff.reward import RewardModel
from dydiff.rollout import Trajectory, make_synthetic_transitions, score
from dydiff.trainer import Evaluation, PolicyTrainer, Rollouts, Saving

CASES = ("evaluation", "epoch")
VARIANTS = ("published", "ours", "beside")
PARTS = ("rollout", "updates", "evaluation")
EPISODES, EPOCHS, UPDATES, REPLAY = 10, 3, 500, 100_000
FILTER = ("softmax", 0.6, 0.05)
NEVER_ENDS = terminal_function("halfcheetah")  # rollouts of random models would end at once


def evaluate_one_by_one(
    spec: EnvironmentSpec, act: Callable[[np.ndarray], np.ndarray], seed: int, steps: int, longest: int = 1000
) -> list[float]:
    """Returns of episodes, one after the other, until they hold `steps` steps."""
    environment, returns, done = spec.make(), [], 0
    while done < steps:
        observation, _ = environment.reset(seed=episode_seed(seed, len(returns)))
        total, over, length = 0.0, False, 0
        while not over:
            action = act(observation[None].astype(np.float32))[0]
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, length = total + reward, length + 1
            over = terminated or truncated or length >= longest
        returns.append(total)
        done += length
    environment.close()
    return returns


def make_evaluation_case(length: int) -> Case:
    """Ten episodes in both ways, with the same policy and seeds."""
    spec = environment_spec("halfcheetah")
    policy = TanhGaussianPolicy(spec.observation_dim, spec.action_dim, generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(spec, EPISODES * length, length)

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        return policy.mean_action(torch.from_numpy(observation)).numpy()

    def one_by_one() -> Tensor:
        return torch.tensor(evaluate_one_by_one(spec, act, 0, EPISODES * length, length))

    def lockstep() -> Tensor:
        return torch.from_numpy(evaluator.evaluate(act, 0).returns)

    runs = {"published": one_by_one, "ours": lockstep}
    made = [Variant(name, "float32", run, one_by_one, EPISODES * length, 0.0) for name, run in runs.items()]
    return Case("evaluation", EPISODES, length, made, "episodes of so many steps", tolerance=100.0)


class PublishedEpochs:
    """Epochs as they are written from the paper; `parts` holds the seconds of the last call by part."""

    dtype = "float32"

    def __init__(self, work: Workload, steps: int):
        self.work, self.steps, self.epoch = work, steps, 0
        self.rollouts = Published(work)
        self.agent = PublishedTD3BC(OBSERVATION_DIM, ACTION_DIM, tuned=False, device=work.device)
        self.reward_model = RewardModel(OBSERVATION_DIM, ACTION_DIM).to(work.device).requires_grad_(False)
        self.replay = [Replay(REPLAY, OBSERVATION_DIM, ACTION_DIM, work.device) for _ in range(2)]
        for seed, replay in enumerate(self.replay):
            for stored, field in zip(replay.fields, make_transitions(REPLAY, "cpu", seed), strict=True):
                stored[:] = field.numpy().reshape(REPLAY, -1)
            replay.size = REPLAY

    def run(self) -> Tensor:
        self.parts = dict.fromkeys(PARTS, 0.0)
        for _ in range(EPOCHS):
            for name, part in zip(PARTS, (self._roll_out, self._update, self._evaluate), strict=True):
                began = time.perf_counter()
                part()
                self.parts[name] += time.perf_counter() - began
            self.epoch += 1
        return torch.ones(1)

    @torch.no_grad()
    def _roll_out(self) -> None:
        work = self.work
        trajectory = Trajectory(*self.rollouts.rollout().float().split([OBSERVATION_DIM, ACTION_DIM], dim=-1))
        keep = keep_mask(score(self.reward_model, trajectory), *FILTER, work.generator())
        kept = Trajectory(*(field[keep] for field in trajectory))
        transitions, _ = make_synthetic_transitions(kept, self.reward_model, NEVER_ENDS, work.spaces)
        self.replay[1].extend(transitions)

    def _update(self) -> None:
        for _ in range(UPDATES):
            self.agent.update(sample_published(*self.replay, BATCH, NUM_REAL))

    def _evaluate(self) -> None:
        act = in_raw_space(self.agent.mean_action, self.work.spaces)
        evaluate_one_by_one(environment_spec("hopper"), act, self.epoch, self.steps)


class OurEpochs:
    """Epochs of dydiff's trainer, which evaluates in this process or, if `beside`, in a worker."""

    def __init__(self, work: Workload, steps: int, beside: bool):
        runner = Ours(work, "auto")
        model = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM}
        where = environment_spec("hopper"), steps, 1000, EPISODES, work.device
        description = describe_evaluation("td3_bc", model, work.spaces, *where)
        reward_model = RewardModel(OBSERVATION_DIM, ACTION_DIM).to(work.device).requires_grad_(False)
        shape = work.shape
        self.dtype = runner.dtype
        self.trainer = PolicyTrainer(
            AGENTS["td3_bc"](**model, device=work.device, generator=torch.Generator().manual_seed(0)),
            work.spaces,
            *(ReplayBuffer.from_transitions(make_transitions(REPLAY, work.device, seed), REPLAY) for seed in (0, 1)),
            Rollouts(runner.engine, reward_model, NEVER_ENDS, shape.batch, shape.horizon, 1, *FILTER),
            Evaluation((EvaluationWorker if beside else PolicyEvaluator)(description), "made-up", 0, 1),
            Saving(1, False, False, False, {}),
            num_epochs=10**6,
            updates_per_epoch=UPDATES,
            batch_size=BATCH,
            real_ratio=REAL_RATIO,
            seed=0,
        )

    def run(self) -> Tensor:
        records = [self.trainer.run_epoch() for _ in range(EPOCHS)]
        began = time.perf_counter()
        if None in records:
            records = [record for _, record in self.trainer.late_records(wait=True)]
        waited = time.perf_counter() - began
        self.parts = {name: sum(record[f"time/{name}"] for record in records) for name in PARTS}
        self.parts["evaluation"] += waited
        return torch.ones(1)


def make_epoch_case(variants: Sequence[str], work: Workload, steps: int, failures: Failures) -> tuple[Case, dict[str, Any]]:
    """The case and, by variant that can be made, what computes it."""
    builders = {
        "published": lambda: PublishedEpochs(work, steps),
        "ours": lambda: OurEpochs(work, steps, beside=False),
        "beside": lambda: OurEpochs(work, steps, beside=True),
    }
    runners, made = {}, []
    for name in variants:
        with failures.attempt(f"{name} in epoch"):
            runners[name] = builders[name]()
            run = torch.enable_grad()(runners[name].run)
            made.append(Variant(name, runners[name].dtype, run, run, EPOCHS, 0.0))
    note = f"{EPOCHS} epochs a call: {UPDATES} updates and {steps} environment steps each"
    return Case("epoch", work.shape.batch, work.shape.horizon, made, note), runners


def measure(session: Session) -> None:
    """Check and measure all cases."""
    options = session.options
    options.starts = options.starts or (4 if options.quick else 2048 if options.device.startswith("cuda") else 16)
    options.evaluation_steps = options.evaluation_steps or (1000 if options.quick else 5000)
    for name in options.cases:
        run_case(name, session)


def run_case(name: str, session: Session) -> None:
    """Check and measure one case, and show where an epoch's time went."""
    torch.compiler.reset()
    options = session.options
    runners: dict[str, Any] = {}
    if name == "evaluation":
        case = make_evaluation_case(100 if options.quick else 1000)
    else:
        shape = Shape(options.starts, options.horizon, options.dim, tuple(options.dim_mults))
        work = Workload(shape, options.device, num_steps=options.num_steps)
        case, runners = make_epoch_case(options.variants, work, options.evaluation_steps, session.failures)
    patience = Patience(options.seconds, least=1 if options.quick else 3, warm_up=True, reuse=options.quick)
    measurements = session.race(case, patience)
    right = [each.variant.name for each in measurements if each.variant.name in runners]
    parts = {label: {part: s / EPOCHS for part, s in runners[label].parts.items()} for label in right}
    session.record(case, measurements, extra={label: {f"{part}_s": s for part, s in of.items()} for label, of in parts.items()})
    for label, seconds in parts.items():
        shown = ", ".join(f"{part} {show_seconds(s)}" for part, s in seconds.items())
        print(f"    {label}, the last call, an epoch: {shown}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_timing_parser(__doc__, quick="four starts, short evaluations, one repetition")
    number = positive(int)
    parser.add_argument("--cases", type=some_of(CASES), default=list(CASES), help=f"some of {','.join(CASES)}")
    variants = f"of epoch, some of {','.join(VARIANTS)}"
    parser.add_argument("--variants", type=some_of(VARIANTS), default=list(VARIANTS), help=variants)
    parser.add_argument("--starts", type=number, help="start states of a rollout (default: 16 on a CPU, 2048 on a GPU; --quick: 4)")
    parser.add_argument("--horizon", type=number, default=HORIZON, help="rows of a rollout")
    parser.add_argument("--num-steps", type=number, default=NUM_STEPS, help="noise levels of the sampler")
    parser.add_argument("--evaluation-steps", type=number, help="environment steps of an evaluation (default: 5000, --quick: 1000)")
    add_network_options(parser)
    options = parser.parse_args(arguments)
    check_network(parser, options)
    if options.num_steps < 2:
        parser.error("argument --num-steps: the sampler has no fewer than 2 noise levels")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return run_benchmark(parse_arguments(arguments), measure)


if __name__ == "__main__":
    sys.exit(main())
