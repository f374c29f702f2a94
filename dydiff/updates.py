"""An agent's updates on batches from replay, run in one of three modes that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from dydiff.agents import Agent
from dydiff.capture import CapturedGraph, can_compile, compile_function, trace_gradients, warm_up
from dydiff.device import fast_float32
from dydiff.errors import DydiffError
from dydiff.replay import ReplayBuffer, count_real, sample_mixed

MODES = ("auto", "eager", "compiled", "graph")
UPDATES_A_GRAPH = 10  # a multiple of the agents' own rhythms (2 and 5), so that few different graphs are needed
WORTH_COMPILING = 50_000  # updates of a run; compiling takes about as long as it saves in this many

Sums = dict[str, Tensor]


class Updates:
    """Runs updates of `agent`: draws each batch and its noise from `generator`, applies them, and averages what is logged.

    Modes: `eager`; `compiled`, the update by Inductor; `graph`, on a GPU, several updates with their draws as one CUDA graph,
    one graph per pattern of what the agent's step counter decides. All consume the same random numbers and differ in rounding
    only. `auto` is `graph` on a GPU and `compiled` on a CPU that has a compiler, if the run's `num_updates` pay for it.

    Raises:
        DydiffError: no such mode, or one that cannot work on the agent's device.
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
    ):
        self.agent = agent
        self.real = real
        self.synthetic = synthetic
        self.batch_size = batch_size
        self.real_ratio = real_ratio
        self.generator = generator
        self.mode = choose_mode(mode, agent.device, num_updates)
        self._apply = agent.apply_update
        if self.mode == "compiled":
            trace_gradients()
            self._apply = compile_function(agent.apply_update, "rl_trainer_params.update_mode")
        self._graphs: dict[Hashable, CapturedGraph | None] = {}

    def run(self, count: int, on_update: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """Run `count` updates and return the mean of each logged figure; the device is read once, at the end."""
        num_real = count_real(self.synthetic, self.batch_size, self.real_ratio)
        totals: Sums = {}
        counts: dict[str, int] = {}
        at_once = UPDATES_A_GRAPH if self.mode == "graph" else 1
        with fast_float32():
            for first in range(0, count, at_once):
                variants = self._advance(min(at_once, count - first))
                sums, numbers = self._run_together(variants, num_real)
                for name, value in sums.items():
                    totals[name] = totals[name] + value if name in totals else value.clone()
                    counts[name] = counts.get(name, 0) + numbers[name]
                on_update(len(variants))
        return {name: float(total) / counts[name] for name, total in totals.items()}

    def _advance(self, count: int) -> tuple[tuple[bool, ...], ...]:
        """Count the next updates as done, and return what the agent's step counter decides for each."""
        variants = []
        for _ in range(count):
            variants.append(self.agent.variant())
            self.agent.step += 1
        return tuple(variants)

    def _run_together(self, variants: tuple[tuple[bool, ...], ...], num_real: int) -> tuple[Sums, dict[str, int]]:
        work = partial(self._compute, variants, num_real)
        if self.mode != "graph":
            return work()
        key = (variants, num_real)
        if key not in self._graphs:
            self._graphs[key] = None  # these updates count; the next ones of their kind are captured
            return warm_up(work)
        if self._graphs[key] is None:
            self._graphs[key] = CapturedGraph(work, self.generator)
        return self._graphs[key].replay()

    def _compute(self, variants: tuple[tuple[bool, ...], ...], num_real: int) -> tuple[Sums, dict[str, int]]:
        """The device work of updates in a row: sums of each logged figure, and of how many updates."""
        sums: Sums = {}
        counts: dict[str, int] = {}
        for variant in variants:
            batch = sample_mixed(self.real, self.synthetic, self.batch_size, num_real, self.generator)
            noise = self.agent.draw_noise(self.batch_size, self.generator)
            for name, value in self._apply(batch, noise, variant).items():
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + 1
        return sums, counts


def choose_mode(mode: str, device: torch.device, num_updates: int) -> str:
    """The mode that `mode` means on a device.

    Raises:
        DydiffError: no such mode, or one that cannot work on the device.
    """
    if mode not in MODES:
        raise DydiffError(f"Unknown rl_trainer_params.update_mode '{mode}': choose from {', '.join(MODES)}.")
    if mode == "auto":
        if device.type == "cuda":
            return "graph"
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
