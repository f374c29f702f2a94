"""EDM preconditioning and training loss (Karras et al. 2022, arXiv 2206.00364), conditioned by overwriting (SPEC section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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
        return self.unet(model_input, self._time_biases[sigma])


def edm_loss(
    denoiser: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor, use_cond: bool = True, cond_on_action: bool = True
) -> Tensor:
    """Weighted squared denoising error per element, [B, H, D] (arXiv 2206.00364, eq. 2 with table 1's weight).

    Shapes: clean [B, H, D] in model space, sigma [B], noise [B, H, D] standard normal. `use_cond` shows the network the clean
    first observation, `cond_on_action` all clean actions; every column counts in the loss all the same.
    """
    observation_dim = denoiser.observation_dim
    level = sigma[:, None, None]
    noisy = inpaint(
        clean + level * noise,
        clean[:, 0, :observation_dim] if use_cond else None,
        clean[:, :, observation_dim:] if cond_on_action else None,
    )
    weight = (level**2 + denoiser.sigma_data**2) / (level * denoiser.sigma_data) ** 2
    return weight * (denoiser(noisy, sigma) - clean) ** 2


def draw_sigma(batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw training noise levels [B], ln(sigma) ~ N(-1.2, 1.2^2), on the generator's device."""
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return (normal * P_STD + P_MEAN).exp()
