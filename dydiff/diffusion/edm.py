"""EDM preconditioning and training loss (Karras et al. 2022, arXiv 2206.00364), conditioned by overwriting (SPEC section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dydiff.device import sum_in_float32
from dydiff.kernels.reference import inpaint
from dydiff.networks.fused_unet import Blocks, FusedUNet

P_MEAN, P_STD = -1.2, 1.2  # ln(sigma) ~ N(P_MEAN, P_STD^2) in training (arXiv 2206.00364, table 1)


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `c_skip, c_out, c_in, c_noise` for noise levels of any shape (arXiv 2206.00364, table 1)."""
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / variance.sqrt()
    c_in = 1 / variance.sqrt()
    return c_skip, c_out, c_in, sigma.log() / 4


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), the preconditioned trajectory network.

    Shapes: x [B, H, D], sigma [B] -> [B, H, D]; columns are observations first, then actions.
    """

    def __init__(self, network: nn.Module, observation_dim: int, sigma_data: float = 0.5):
        super().__init__()
        self.network = network
        self.observation_dim = observation_dim
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = precondition(sigma[:, None, None], self.sigma_data)
        return c_skip * x + c_out * self.network(c_in * x, c_noise[:, 0, 0])

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """F(model_input [B, H, D]; sigma), the raw network at one noise level for the whole batch: what a sampler calls."""
        # One noise label: the network broadcasts what it derives from it.
        return self.network(model_input, model_input.new_full((1,), math.log(sigma) / 4))


class FusedDenoiser:
    """A trained U-Net denoiser for sampling through a blocks backend; packs the weights as they are now.

    Offers what samplers use: `evaluate(model_input [B, H, D], sigma)` and `sigma_data`. The time biases of a noise level are
    computed at its first use and kept.
    """

    def __init__(self, denoiser: Denoiser, blocks: Blocks):
        self.sigma_data = denoiser.sigma_data
        self.unet = FusedUNet(denoiser.network, blocks)
        self._time_biases: dict[float, list[Tensor]] = {}

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        """The same as `Denoiser.evaluate`, to the backend's precision."""
        if sigma not in self._time_biases:
            label = model_input.new_full((1,), math.log(sigma) / 4)
            (self._time_biases[sigma],) = self.unet.time_table(label)
        with sum_in_float32():
            return self.unet(model_input, self._time_biases[sigma])


def edm_loss(
    denoiser: Denoiser,
    clean: Tensor,
    sigma: Tensor,
    noise: Tensor,
    use_cond: bool = True,
    cond_on_action: bool = True,
    shown_action: Tensor | None = None,
) -> Tensor:
    """Weighted squared denoising error per element, [B, H, D] (arXiv 2206.00364, eq. 2 with table 1's weight).

    Shapes: clean [B, H, D] in model space, sigma [B], noise [B, H, D] standard normal. `use_cond` shows the network the clean
    first observation, `cond_on_action` all clean actions, or `shown_action` [B, H, A] in their place; every column counts in the
    loss all the same.
    """
    observation_dim = denoiser.observation_dim
    shown_action = clean[:, :, observation_dim:] if shown_action is None else shown_action
    level = sigma[:, None, None]
    noisy = inpaint(
        clean + level * noise,
        clean[:, 0, :observation_dim] if use_cond else None,
        shown_action if cond_on_action else None,
    )
    weight = (level**2 + denoiser.sigma_data**2) / (level * denoiser.sigma_data) ** 2
    return weight * (denoiser(noisy, sigma) - clean) ** 2


def draw_sigma(batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw training noise levels [B], ln(sigma) ~ N(-1.2, 1.2^2), on the generator's device."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return (normal * P_STD + P_MEAN).exp()


class ForeignActions(NamedTuple):
    """Which windows of a batch are shown foreign actions: from row `cut` [B] on, a share `blend` [B] of another window's."""

    cut: Tensor  # the horizon: none
    blend: Tensor


def draw_foreign_actions(batch_size: int, horizon: int, share: float, generator: torch.Generator) -> ForeignActions:
    """Draw them for a `share` of the windows on average, on the generator's device; cuts and blends are uniform."""
    device = generator.device
    affected, blend = torch.rand(2, batch_size, generator=generator, device=device)
    cut = torch.randint(1, horizon, (batch_size,), generator=generator, device=device)
    return ForeignActions(torch.where(affected < share, cut, horizon), blend)


def show_foreign_actions(clean: Tensor, other: Tensor, foreign: ForeignActions, observation_dim: int) -> tuple[Tensor, Tensor]:
    """The actions that the network is shown [B, H, A], and which elements of its output count [B, H, D].

    In a simulator a state follows from the actions before it. In data later actions tell of it too, since they were chosen in view
    of it, and a denoiser that sees them all learns to read them so (arXiv 2110.10819). Where they are foreign they tell nothing:
    what counts then are the states that the window's own actions led to. Shapes: clean, other [B, H, D].
    """
    row = torch.arange(clean.shape[1], device=clean.device)[:, None]  # [H, 1]
    cut, blend = foreign.cut[:, None, None], foreign.blend[:, None, None]
    action, others = clean[:, :, observation_dim:], other[:, :, observation_dim:]
    shown = torch.where(row < cut, action, torch.lerp(action, others, blend))
    counted = [(row <= cut).expand(-1, -1, observation_dim), (row < cut).expand(-1, -1, action.shape[2])]
    return shown, torch.cat(counted, dim=2)
