"""The stochastic Heun sampler of EDM with inpainting (arXiv 2206.00364, algorithm 2; SPEC section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dydiff.diffusion.edm import Denoiser, FusedDenoiser
from dydiff.kernels import edm, reference

# shape -> standard normal numbers, in the order in which they are consumed (or their names, where the step makes them itself)
Draw = Callable[[tuple[int, ...]], Tensor | edm.PhiloxDraw]


@torch.no_grad()
def sample_edm(
    denoiser: Denoiser | FusedDenoiser,
    shape: tuple[int, int, int],
    draw: Draw,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    num_steps: int = 34,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 60.0,
    s_min: float = 0.36995,
    s_max: float = 52.242,
    s_noise: float = 1.002,
    inpaint_churn: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sample trajectories in model space; 2 num_steps - 1 network evaluations.

    Shapes: `shape` is (B, H, D); first_observation [B, O] and actions [B, H, A] overwrite row 0's observations and all actions
    after every update (None: left free); returns [B, H, D]. `draw` is called for the latents and then once a step.

    Churn puts noise on what was overwritten, too, so that the first evaluation of a churned step does not see the condition as it
    did in training. The method is published so; `inpaint_churn` overwrites once more behind the churn.

    Raises:
        DydiffError: `backend="extension"` where the compiled step is not available.
    """
    sigma_data = denoiser.sigma_data
    schedule = reference.noise_schedule(num_steps, sigma_min, sigma_max, rho)
    latents = draw(shape)
    backend = edm.available_backend(latents.device, latents.dtype) if backend == "auto" else backend
    nothing = torch.zeros(shape, device=latents.device, dtype=latents.dtype)
    x, _ = edm.churn_step(nothing, latents, 0.0, schedule[0], 1.0, backend=backend)
    condition = {"first_observation": first_observation, "actions": actions, "sigma_data": sigma_data, "backend": backend}

    x = reference.inpaint(x, first_observation, actions)
    for sigma, sigma_next in zip(schedule, schedule[1:], strict=False):
        sigma_hat = reference.churned(sigma, num_steps, s_churn, s_min, s_max)
        noise = draw(shape)
        x_hat, model_input = edm.churn_step(x, noise, sigma, sigma_hat, s_noise, sigma_data=sigma_data, backend=backend)
        if inpaint_churn:
            x_hat = reference.inpaint(x_hat, first_observation, actions)
            model_input = reference.precondition(sigma_hat, sigma_data)[2] * x_hat
        output = denoiser.evaluate(model_input, sigma_hat)
        x, model_input = edm.euler_step(x_hat, output, sigma_hat, sigma_next, **condition)
        if sigma_next > 0:
            output = denoiser.evaluate(model_input, sigma_next)
            x = edm.heun_step(x_hat, x, output, sigma_hat, sigma_next, **condition)
    return x
