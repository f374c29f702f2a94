"""The actor of Diffusion-QL: a short DDPM over actions, conditioned on the observation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dydiff.errors import DydiffError
from dydiff.networks.embedding import sinusoidal_embedding
from dydiff.networks.mlp import MLP, mish

# Where the published code's layers are found in ours (both have `.weight` and `.bias`).
PUBLISHED_NAMES = {
    "time_mlp.1": "step_embedding.layers.0",
    "time_mlp.3": "step_embedding.layers.1",
    "mid_layer.0": "network.layers.0",
    "mid_layer.2": "network.layers.1",
    "mid_layer.4": "network.layers.2",
    "final_layer": "network.layers.3",
}


def make_betas(schedule: str, num_steps: int) -> Tensor:
    """Noise variances `[T]` in float64: `vp` (arXiv 2208.06193), `linear`, or `cosine` (arXiv 2102.09672, eq. 17).

    Raises DydiffError for an unknown schedule.
    """
    if schedule == "vp":
        t = torch.arange(1, num_steps + 1, dtype=torch.float64)
        return 1 - torch.exp(-0.1 / num_steps - 4.95 * (2 * t - 1) / num_steps**2)
    if schedule == "linear":
        return torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64)
    if schedule == "cosine":
        x = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        signal = torch.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)
    raise DydiffError(f"Unknown beta_schedule '{schedule}': choose vp, linear or cosine.")


class DiffusionActor(nn.Module):
    """Predicts the noise in an action: input `[a_t, e(t), o]`, 3 x (Linear 256, Mish), Linear (SPEC section 7).

    Actions live in [-1, 1]; `B` below may be any single leading dimension. Noise is always an argument. Where the weights are
    stacked over seeds (`dydiff.agents.stack`), everything has that dimension in front.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        n_timesteps: int = 5,
        beta_schedule: str = "vp",
        generator: torch.Generator | None = None,
        embedding_dim: int = 16,
    ):
        super().__init__()
        self.n_timesteps = n_timesteps
        self.step_embedding = MLP(embedding_dim, [2 * embedding_dim], embedding_dim, mish, generator)
        input_dim = action_dim + embedding_dim + observation_dim
        self.network = MLP(input_dim, [hidden_dim] * 3, action_dim, mish, generator)

        # In float32 from here on: with small betas the cancellation in 1 - signal is visible in the actions, and the
        # published code, whose numbers decide, has it too.
        with torch.device("cpu"):  # as numbers they are wanted even where weights take no memory
            betas = make_betas(beta_schedule, n_timesteps).float()
            signal = torch.cumprod(1 - betas, dim=0)  # alpha-bar
            previous = torch.cat([torch.ones(1), signal[:-1]])
            posterior_variance = betas * (1 - previous) / (1 - signal)
            posterior_std = posterior_variance.sqrt()
            posterior_std[0] = 0  # no noise is added at t = 0
            step_features = sinusoidal_embedding(torch.arange(n_timesteps), embedding_dim)  # [T, 16]
        # [T] each; not part of the weights: they follow from the arguments.
        for name, value in {
            "betas": betas,
            "signal_scale": signal.sqrt(),
            "noise_scale": (1 - signal).sqrt(),
            "start_from_noisy": (1 / signal).sqrt(),
            "start_from_noise": (1 / signal - 1).sqrt(),
            "posterior_from_start": betas * previous.sqrt() / (1 - signal),
            "posterior_from_noisy": (1 - previous) * (1 - betas).sqrt() / (1 - signal),
            "posterior_std": posterior_std,
            "step_features": step_features,
        }.items():
            self.register_buffer(name, value, persistent=False)
        # Of each step, as numbers: what they multiply costs no operation of its own.
        names = "start_from_noisy", "start_from_noise", "posterior_from_start", "posterior_from_noisy", "posterior_std"
        self._posterior = list(zip(*(getattr(self, name).tolist() for name in names), strict=True))

    def forward(self, noisy_action: Tensor, step: Tensor, observation: Tensor) -> Tensor:
        """Predicted noise `[B, A]` in `noisy_action [B, A]` at integer `step [B]`, 0 .. T-1."""
        embedding = self.step_embedding(self.step_features)  # [T, 16]: all T steps are cheaper than B of them
        embedding = embedding.take_along_dim(step.unsqueeze(-1), dim=-2)  # [B, 16]
        return self.network(torch.cat([noisy_action, embedding, observation], dim=-1))

    def predict_start(self, noisy_action: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """The clean action `[B, A]` that `noise` would have led to `noisy_action`, clipped to [-1, 1]."""
        start = self.start_from_noisy[step, None] * noisy_action - self.start_from_noise[step, None] * noise
        return start.clamp(-1, 1)

    def denoising_loss(self, action: Tensor, observation: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the predicted noise `[]` and the one-step reconstruction of the action `[B, A]`."""
        noisy = self.signal_scale[step, None] * action + self.noise_scale[step, None] * noise
        predicted = self(noisy, step, observation)
        return (predicted - noise).square().mean(dim=(-2, -1)), self.predict_start(noisy, step, predicted)

    def sample(self, observation: Tensor, initial_noise: Tensor, step_noise: Tensor) -> Tensor:
        """Action `[B, A]` of `observation [B, O]` by the DDPM posterior (arXiv 2006.11239, eqs. 6 and 7).

        `initial_noise [B, A]` is where it starts; `step_noise [T, B, A]` is used in its order, its last entry never.
        """
        embedding = self.step_embedding(self.step_features)
        noisy = initial_noise
        for t, noise in zip(reversed(range(self.n_timesteps)), step_noise.unbind(-3), strict=True):
            step_embedding = embedding[..., t, None, :].expand(*noisy.shape[:-1], -1)
            inputs = torch.cat([noisy, step_embedding, observation], dim=-1)
            from_noisy, from_noise, start_share, noisy_share, std = self._posterior[t]
            start = (from_noisy * noisy).sub(self.network(inputs), alpha=from_noise).clamp(-1, 1)
            noisy = (start_share * start).add(noisy, alpha=noisy_share).add(noise, alpha=std)
        return noisy.clamp(-1, 1)
