"""The strongest that PyTorch offers without kernels of one's own; see baselines.py."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from baselines import SIGMA_DATA, Act, PlainUNet
from torch import Tensor, nn

from dydiff.capture import CapturedGraph, warm_up
from dydiff.data import Spaces
from dydiff.dynamics import DynamicsEnsemble


class Captured:
    """A function of tensors as one CUDA graph, for tensors of the shapes given first; results are copies."""

    def __init__(self, function: Callable[..., Tensor], *examples: Tensor):
        self.inputs = [example.clone() for example in examples]
        # Kept, because the graph goes on reading what only the function may hold, such as gathered weights.
        self.function = partial(function, *self.inputs)
        for _ in range(3):
            warm_up(self.function, examples[0].device)
        self.graph = CapturedGraph(self.function, examples[0].device)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for mine, theirs in zip(self.inputs, arguments, strict=True):
            mine.copy_(theirs)
        return self.graph.replay().clone()


class StockDenoiser:
    """dydiff's denoiser interface over the fastest arrangement of PlainUNet, for inputs of one shape.

    Candidates: eager and, with `compile`, torch.compile; on a GPU each of them as a CUDA graph. `arrangement` names the winner.
    """

    sigma_data = SIGMA_DATA

    def __init__(self, network: PlainUNet, dtype: torch.dtype, example: Tensor, compile: bool = True):
        self.dtype = dtype
        self.network = network
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm)):
                module.to(dtype=dtype)  # the embedding of the noise level stays in float32: it costs nothing
        network.to(memory_format=torch.channels_last)
        self._labels: dict[float, Tensor] = {}
        candidates = {"eager": self._forward}
        if compile:
            candidates["compiled"] = torch.compile(self._forward, dynamic=False)
        label = self._label(1.0, example)
        timed = {}
        with torch.no_grad(), self._cudnn_benchmark():
            for name, function in candidates.items():
                with contextlib.suppress(torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError):
                    function = Captured(function, example, label) if example.is_cuda else function
                    timed[name] = _time(lambda function=function: function(example, label), example.is_cuda), function
        self.arrangement = min(timed, key=lambda name: timed[name][0])
        self._function = timed[self.arrangement][1]
        self._plain = candidates[self.arrangement]  # not captured yet

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The network alone: [B, H, D] float32 -> [B, H, D] float32."""
        with torch.no_grad(), self._cudnn_benchmark():
            return self._function(model_input, self._label(sigma, model_input))

    def for_graph(self) -> SimpleNamespace:
        """The same for a caller that captures a whole sampler pass."""

        def evaluate(model_input: Tensor, sigma: float) -> Tensor:
            with torch.no_grad(), self._cudnn_benchmark():
                return self._plain(model_input, self._label(sigma, model_input))

        return SimpleNamespace(sigma_data=self.sigma_data, evaluate=evaluate)

    def _forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.network(x.to(self.dtype), label).float()

    def _label(self, sigma: float, like: Tensor) -> Tensor:
        if sigma not in self._labels:
            self._labels[sigma] = torch.full((1,), math.log(sigma) / 4, device=like.device)
        return self._labels[sigma]

    @staticmethod
    @contextlib.contextmanager
    def _cudnn_benchmark() -> Iterator[None]:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


class StockStart:
    """The first guess as in `start_published`, of the elites alone, for one batch size and horizon; on a GPU one CUDA graph."""

    def __init__(self, dynamics: DynamicsEnsemble, act: Act, spaces: Spaces, first: Tensor, horizon: int):
        members = [(layer.weight[dynamics.elites], layer.bias[dynamics.elites]) for layer in dynamics.network.layers]
        width = first.shape[-1]

        def roll(first: Tensor, elites: Tensor) -> Tensor:  # [B, O], [H-1, B] -> [B, H, D]
            rows, observation, action = torch.arange(len(first), device=first.device), first, act(first)
            steps = [torch.cat([observation, action], dim=1)]
            for h in range(horizon - 1):
                observation = spaces.observation_model_to_policy(observation)
                hidden = torch.cat([observation, spaces.action_model_to_policy(action)], dim=1)
                hidden = hidden.expand(len(dynamics.elites), -1, -1)
                for weight, bias in members[:-1]:
                    hidden = F.silu(torch.baddbmm(bias, hidden, weight))
                weight, bias = members[-1]
                change = torch.baddbmm(bias[..., :width], hidden, weight[..., :width])[elites[h], rows]
                observation = spaces.observation_policy_to_model(observation + change)
                action = act(observation)
                steps.append(torch.cat([observation, action], dim=1))
            return torch.stack(steps, dim=1)

        self.observation_dim = width
        elites = torch.zeros(horizon - 1, len(first), dtype=torch.long, device=first.device)
        self._roll = Captured(roll, first, elites) if first.is_cuda else roll

    def __call__(self, first: Tensor, elites: Tensor) -> tuple[Tensor, Tensor]:
        guess = self._roll(first, elites)
        return guess[..., : self.observation_dim], guess[..., self.observation_dim :]


def _time(function: Callable[[], Tensor], on_gpu: bool, repeats: int = 3) -> float:
    """Shortest of a few calls after one to warm up, in seconds."""
    function()
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
