"""Updates of an agent, or of equal agents of several seeds at once, on batches from replay, in one of three modes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dydiff.agents import Agent
from dydiff.agents.stack import stack_agents
from dydiff.capture import CapturedGraph, can_compile, captures, compile_unchecked, trace_gradients, warm_up
from dydiff.device import fast_float32, keep_freed_memory, multiply_in, sum_in_float32
from dydiff.errors import DydiffError
from dydiff.replay import ReplayBuffer, count_real, draw_mixed_rows, split_rows

MODES = ("auto", "eager", "compiled", "graph")
PRECISIONS = ("float32", "bf16")
UPDATES_A_GRAPH = 10  # a multiple of what the agents' variants repeat after (2 and 5), so that few different graphs are needed
WORTH_COMPILING = 50_000  # updates of a run; compiling takes about as long as it saves in this many

Sums = dict[str, Tensor]
Variants = tuple[tuple[bool, ...], ...]
Draw = tuple[Tensor, NamedTuple]  # a batch's rows and the noise of its update


class Learner(NamedTuple):
    """An agent, what it learns from, and where its batches and their noise are drawn from."""

    agent: Agent
    real: ReplayBuffer
    synthetic: ReplayBuffer
    generator: torch.Generator


class Updates:
    """Runs updates of an agent: draws each batch and its noise from `generator`, applies them, and averages what is logged.

    Modes: `eager`; `compiled`, few updates by Inductor; `graph`, on a GPU, several updates with their draws as one CUDA graph.
    There compiled updates are captured, too, as long as `captures` allows it. The fast ones make one function or graph per pattern
    of what the agent's step counter decides. All consume the same random numbers and differ in rounding only. `auto` is `graph` on
    a GPU and `compiled` on a CPU that has a compiler, if the run's `num_updates` pay for it; else `eager`. Batches of one
    transition are never compiled.

    `precision` is that of the matrix products: `float32`, or `bf16` with sums, values, losses, weights and Adam in float32.

    Raises:
        DydiffError: no such mode or precision, or a mode that cannot work on the agent's device; from `run`, an agent whose figures
            are not one number for each seed.
    """

    def __init__(
        self,
        agent: Agent,
        real: ReplayBuffer,
        synthetic: ReplayBuffer,
        batch_size: int,
        real_ratio: float,
        generator: torch.Generator,
        mode: str,
        num_updates: int,
        precision: str = "float32",
    ):
        if precision not in PRECISIONS:
            raise DydiffError(f"Unknown rl_trainer_params.update_precision '{precision}': choose from {', '.join(PRECISIONS)}.")
        self.batch_size = batch_size
        self.real_ratio = real_ratio
        self.precision = precision
        self.mode = choose_mode(mode, agent.device, num_updates)
        if self.mode == "compiled" and batch_size == 1:
            # Inductor turns products of one row into loops and merges them with Adam's, behind which they read the new weights.
            self.mode = "eager"
        keep_freed_memory()
        self.learners = [Learner(agent, real, synthetic, generator)]
        self._prepare(agent)

    @classmethod
    def together(cls, parts: Sequence[Updates]) -> Updates:
        """The updates of equal agents of several seeds in one: each as in its own `Updates`, which must not run any more."""
        first = parts[0]
        if len(parts) == 1:
            return first
        (agent, real, synthetic, generator), *_ = learners = [part.learners[0] for part in parts]
        updates = cls(agent, real, synthetic, first.batch_size, first.real_ratio, generator, first.mode, 0, first.precision)
        updates.learners = learners
        updates._prepare(stack_agents([learner.agent for learner in learners]))
        return updates

    def _prepare(self, agent: Agent) -> None:
        self._agent = agent  # the only one, or all in one
        self.captured = self.mode == "graph" or (self.mode == "compiled" and captures(agent.device))
        self.at_once = UPDATES_A_GRAPH if self.captured else agent.rhythm if self.mode == "compiled" else 1
        self._functions: dict[Variants, Callable[[list[Draw]], tuple[Sums, dict[str, int]]]] = {}
        self._graphs: dict[Hashable, CapturedGraph | None] = {}

    def run(self, count: int, on_update: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """Run `count` updates and return the mean of each logged figure; the device is read once, at the end."""
        (means,) = self.run_all(count, on_update)
        return means

    def run_all(self, count: int, on_update: Callable[[int], None] = lambda count: None) -> list[dict[str, float]]:
        """`run` for several seeds together: the means of each."""
        nums_real = tuple(count_real(each.synthetic, self.batch_size, self.real_ratio) for each in self.learners)
        totals: Sums = {}
        counts: dict[str, int] = {}
        with fast_float32(self._agent.device), sum_in_float32():
            for first in range(0, count, self.at_once):
                variants = self._advance(min(self.at_once, count - first))
                sums, numbers = self._run_together(variants, nums_real)
                if self.captured:
                    sums = {name: value.clone() for name, value in sums.items()}  # the next replay overwrites them
                _add(totals, sums)
                _add(counts, numbers)
                on_update(len(variants))
        for name, total in totals.items():
            if total.numel() != len(self.learners):
                raise DydiffError(
                    f"{type(self._agent).__name__} logs {name} with shape {list(total.shape)}, not one number for each of "
                    f"{len(self.learners)} seed(s). Sums and means of an update must name the dimensions that they run over, the "
                    "last ones: seeds that train together have one of their own in front."
                )
        means = torch.stack([(total / counts[name]).view(-1) for name, total in totals.items()], dim=1)  # [seeds, figures]
        return [dict(zip(totals, values, strict=True)) for values in means.tolist()]

    def _advance(self, count: int) -> Variants:
        """Count the next updates as done, and return what the agents' step counters, all the same, decide for each."""
        variants = []
        for _ in range(count):
            variants.append(self.learners[0].agent.variant())
            for learner in self.learners:
                learner.agent.step += 1
        return tuple(variants)

    def _run_together(self, variants: Variants, nums_real: tuple[int, ...]) -> tuple[Sums, dict[str, int]]:
        work = partial(self._compute, variants, nums_real)
        if not self.captured:
            return work()
        key = (variants, nums_real)
        if key not in self._graphs:
            outcome = warm_up(work, self._agent.device)
            self._graphs[key] = None  # these updates count; the next ones of their kind are captured
            return outcome
        if self._graphs[key] is None:
            self._graphs[key] = CapturedGraph(work, self._agent.device, *(learner.generator for learner in self.learners))
        return self._graphs[key].replay()

    def _compute(self, variants: Variants, nums_real: tuple[int, ...]) -> tuple[Sums, dict[str, int]]:
        """The device work of updates in a row: sums of each logged figure (`[S]` for several seeds), and of how many updates."""
        return self._apply(variants, [self._draw(nums_real) for _ in variants])

    def _draw(self, nums_real: tuple[int, ...]) -> Draw:
        """A batch and the noise of its update: each seed draws its own, and they are stacked."""
        rows, noises = [], []
        for (agent, real, synthetic, generator), num_real in zip(self.learners, nums_real, strict=True):
            rows.append(draw_mixed_rows(real, synthetic, self.batch_size, num_real, generator))
            noises.append(agent.draw_noise(self.batch_size, generator))
        if len(rows) == 1:
            return rows[0], noises[0]
        return torch.stack(rows), type(noises[0])(*map(torch.stack, zip(*noises, strict=True)))

    def _apply(self, variants: Variants, draws: list[Draw]) -> tuple[Sums, dict[str, int]]:
        """`_compute` on given draws."""
        piece = self._agent.rhythm if self.mode == "compiled" else len(variants)  # that much is compiled as one
        sums: Sums = {}
        counts: dict[str, int] = {}
        for first in range(0, len(variants), piece):
            part = slice(first, first + piece)
            some, numbers = self._function(variants[part])(draws[part])
            _add(sums, some)
            _add(counts, numbers)
        return sums, counts

    def _function(self, variants: Variants) -> Callable[[list[Draw]], tuple[Sums, dict[str, int]]]:
        """What computes updates in a row: one function for each pattern of variants."""
        if variants not in self._functions:
            agent, widths, precision = self._agent, self.learners[0].real.widths, self.precision

            def apply(draws: list[Draw]) -> tuple[Sums, dict[str, int]]:
                sums: Sums = {}
                counts: dict[str, int] = {}
                for variant, (rows, noise) in zip(variants, draws, strict=True):
                    with multiply_in(precision, agent.device):
                        log = agent.apply_update(split_rows(rows, widths), noise, variant)
                    _add(sums, log)
                    _add(counts, dict.fromkeys(log, 1))
                return sums, counts

            if self.mode == "compiled":
                apply = compile_unchecked(apply, agent.device, "rl_trainer_params.update_mode")
            self._functions[variants] = apply
        return self._functions[variants]


def _add(totals: dict, parts: Mapping) -> None:
    """Add each part to the total of its name; the first one is the total."""
    for name, part in parts.items():
        totals[name] = totals[name] + part if name in totals else part


def choose_mode(mode: str, device: torch.device, num_updates: int) -> str:
    """The mode that `mode` means on a device.

    Raises:
        DydiffError: no such mode, or one that cannot work on the device.
    """
    if mode not in MODES:
        raise DydiffError(f"Unknown rl_trainer_params.update_mode '{mode}': choose from {', '.join(MODES)}.")
    if mode == "auto":
        if device.type == "cuda":
            return "graph" if captures(device) else "eager"
        pays = num_updates >= WORTH_COMPILING and can_compile(device) and trace_gradients()
        return "compiled" if pays else "eager"
    if mode == "graph" and device.type != "cuda":
        raise DydiffError(
            f"rl_trainer_params.update_mode 'graph' records CUDA graphs, which a {device.type} has not. Use auto or compiled."
        )
    if mode == "compiled" and not can_compile(device):
        raise DydiffError(
            "rl_trainer_params.update_mode 'compiled' finds no compiler here. Install a C++ compiler (CPU) or a matching Triton "
            "(GPU), or use auto or eager."
        )
    return mode
