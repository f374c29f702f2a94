"""What dydiff is measured against: the method in plain PyTorch, as somebody would write it from the paper.

    published   eager; [B, C, H] tensors and Conv1d; PyTorch's default precision (float32, on a GPU TF32 convolutions); sampler
                state in float64; noise levels as tensors on the device, compared with S_min and S_max on the host at every step
    stock       the strongest that PyTorch offers without kernels of one's own: Conv2d(1, k) channels-last in 16 bit, cudnn
                benchmark, torch.compile, CUDA graphs; of what works on the machine, whichever is faster there

Both load dydiff's weights, and share dydiff's spaces and policy, which cost next to nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.capture import CapturedGraph, warm_up
from dydiff.data import Spaces
from dydiff.diffusion.sampler import Draw
from dydiff.dynamics import DynamicsEnsemble

SIGMA_DATA = 0.5
Act = Callable[[Tensor], Tensor]  # model-space observations [..., O] -> model-space actions [..., A]


def make_convolution(flat: bool, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """A convolution along the horizon: over [B, C, H], or over [B, C, 1, H] if not `flat`."""
    if flat:
        return nn.Conv1d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, (1, kernel_size), (1, stride), (0, kernel_size // 2))


class ConvBlock(nn.Module):
    def __init__(self, flat: bool, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = make_convolution(flat, in_channels, out_channels, 5)
        self.norm = nn.GroupNorm(8, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    def __init__(self, flat: bool, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.block1 = ConvBlock(flat, in_channels, out_channels)
        self.block2 = ConvBlock(flat, out_channels, out_channels)
        self.time = nn.Linear(embedding_dim, out_channels)
        wider = in_channels != out_channels
        self.residual = make_convolution(flat, in_channels, out_channels, 1) if wider else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        bias = self.time(F.mish(embedding)).to(x.dtype)  # [B or 1, C]
        hidden = self.block1(x) + bias.reshape(*bias.shape, *[1] * (x.dim() - 2))
        return self.block2(hidden) + self.residual(x)


class Embedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        half = dim // 2
        index = torch.arange(half, device="cpu")  # even where the weights are made elsewhere
        self.register_buffer("frequency", torch.exp(index * (-math.log(10000) / (half - 1))), persistent=False)

    def forward(self, noise_label: Tensor) -> Tensor:
        angle = noise_label[:, None] * self.frequency
        return self.output(F.mish(self.hidden(torch.cat([angle.sin(), angle.cos()], dim=1))))


class PlainUNet(nn.Module):
    """SPEC section 3's U-Net in torch.nn; names of layers are those of dydiff.networks.unet, whose `weights` it shares.

    Shapes: x [B, H, D], noise_label [B or 1] -> [B, H, D]. `flat` takes Conv1d, otherwise Conv2d(1, k) with channels last.
    """

    def __init__(self, weights: dict[str, Tensor], data_dim: int, dim: int, dim_mults: tuple[int, ...], flat: bool):
        super().__init__()
        widths = [dim * mult for mult in dim_mults]
        ends = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))

        def pair(fan_in: int, fan_out: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(flat, width, fan_out, dim) for width in (fan_in, fan_out))

        def enlarge(width: int) -> nn.Module:
            if flat:
                return nn.ConvTranspose1d(width, width, 4, 2, 1)
            return nn.ConvTranspose2d(width, width, (1, 4), (1, 2), (0, 1))

        self.flat = flat
        self.embed = Embedding(dim)
        self.down = nn.ModuleList(pair(*ends) for ends in zip([data_dim, *widths], widths, strict=False))
        self.downsample = nn.ModuleList(make_convolution(flat, width, width, 3, 2) for width in widths[:-1])
        self.middle = pair(widths[-1], widths[-1])
        self.up = nn.ModuleList(pair(2 * above, below) for above, below in ends)
        self.upsample = nn.ModuleList(enlarge(below) for _, below in ends)
        self.final_block = ConvBlock(flat, dim, dim)
        self.final_conv = make_convolution(flat, dim, data_dim, 1)
        weights = {name: w.unsqueeze(2) if w.ndim == 3 and not flat else w for name, w in weights.items()}
        self.load_state_dict(weights, assign=True)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        embedding = self.embed(noise_label)
        x = x.transpose(1, 2) if self.flat else x.transpose(1, 2).unsqueeze(2)  # [B, D, H] or [B, D, 1, H], channels last
        skips = []
        for level, pair in enumerate(self.down):
            for block in pair:
                x = block(x, embedding)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        for block in self.middle:
            x = block(x, embedding)
        for pair, upsample in zip(self.up, self.upsample, strict=True):
            x = torch.cat([x, skips.pop()], dim=1)
            for block in pair:
                x = block(x, embedding)
            x = upsample(x)
        x = self.final_conv(self.final_block(x))
        return x.transpose(1, 2) if self.flat else x.squeeze(2).transpose(1, 2)


class PublishedDenoiser:
    """D(x; sigma) with float64 outside of the float32 network: x [B, H, D], sigma 0-dim on the device."""

    def __init__(self, network: PlainUNet):
        self.network = network

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(len(x))[:, None, None]
        variance = sigma**2 + SIGMA_DATA**2
        c_skip, c_out, c_in = SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt(), 1 / variance.sqrt()
        label = (sigma.log() / 4)[:, 0, 0]  # [B]
        return c_skip * x + c_out * self.network((c_in * x).float(), label.float())

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The network alone, as dydiff's denoisers offer it."""
        return self.network(model_input, model_input.new_full((len(model_input),), math.log(sigma) / 4))


def sample_published(
    denoise: PublishedDenoiser,
    shape: tuple[int, int, int],
    draw: Draw,
    first_observation: Tensor,
    actions: Tensor,
    num_steps: int = 34,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 60.0,
    s_min: float = 0.36995,
    s_max: float = 52.242,
    s_noise: float = 1.002,
) -> Tensor:
    """SPEC section 3's sampler, line by line, in float64: [B, H, D]."""
    observation_dim = first_observation.shape[1]

    def inpaint(x: Tensor) -> None:
        x[:, 0, :observation_dim] = first_observation
        x[:, :, observation_dim:] = actions

    index = torch.arange(num_steps, dtype=torch.float64, device=actions.device)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (top + index / (num_steps - 1) * (bottom - top)) ** rho
    levels = torch.cat([levels, torch.zeros_like(levels[:1])])
    x = draw(shape).double() * levels[0]
    inpaint(x)
    for i in range(num_steps):
        sigma, sigma_next = levels[i], levels[i + 1]
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        x_hat = x + (sigma_hat**2 - sigma**2).sqrt() * s_noise * draw(shape).double()
        slope = (x_hat - denoise(x_hat, sigma_hat)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * slope
        inpaint(x)
        if i < num_steps - 1:
            slope_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
            inpaint(x)
    return x


def start_published(
    dynamics: DynamicsEnsemble, act: Act, spaces: Spaces, first: Tensor, horizon: int, elites: Tensor
) -> tuple[Tensor, Tensor]:
    """SPEC section 5's first guess: first [B, O] -> observations and actions [B, H, ...], all in model space.

    `elites` [H-1, B] says whose prediction each sample takes. All networks are evaluated, mean and variance, as ensembles do.
    """
    rows = torch.arange(len(first), device=first.device)
    observations, actions = [first], [act(first)]
    for member in dynamics.elites[elites]:
        observation = spaces.observation_model_to_policy(observations[-1])
        mean, _ = dynamics(observation, spaces.action_model_to_policy(actions[-1]))
        observations.append(spaces.observation_policy_to_model(observation + mean[member, rows]))
        actions.append(act(observations[-1]))
    return torch.stack(observations, dim=1), torch.stack(actions, dim=1)


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

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The network alone: [B, H, D] float32 -> [B, H, D] float32."""
        with torch.no_grad(), self._cudnn_benchmark():
            return self._function(model_input, self._label(sigma, model_input))

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


def roll_out(
    start: Callable[[Tensor], tuple[Tensor, Tensor]],
    sample: Callable[[Tensor, Tensor], Tensor],
    act: Act,
    first: Tensor,
    iterations: int = 2,
) -> tuple[Tensor, Tensor]:
    """SPEC section 5 in model space: first [B, O] -> observations and actions [B, H, ...]."""
    observation, action = start(first)
    for _ in range(iterations):
        sampled = sample(first, action)
        observation = (observation + sampled[..., : first.shape[1]].float()) / 2
        action = act(observation)
    return observation, action


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
