"""Fast mode, opt-in: DPM-Solver++(2M) with inpainting, and a warm start (Lu et al. 2022, arXiv 2211.01095).

The method's sampler is `sampler.sample_edm`; this one solves the noise-free ODE of the same denoiser in far fewer network
evaluations, so its samples have another law wherever the network is not exact. Nothing uses it unless it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dydiff.diffusion.edm import Denoiser, FusedDenoiser
from dydiff.diffusion.sampler import Draw
from dydiff.errors import DydiffError
from dydiff.kernels import reference


@dataclass(frozen=True)
class FastMode:
    """How many network evaluations a rollout spends in fast mode, instead of 2 num_steps - 1 in each iteration.

    The first iteration starts from pure noise, later ones from the current guess with noise of level `warm_sigma` on it. The
    defaults come from the quickstart's models (benchmarks/results/sampler-quality-quickstart.json): there 8 + 3 evaluations have a
    smaller rollout error than the method's 134, and more than 8 + 5 gain nothing. A warm start below 0.8 did better still, but it
    trusts the single-step model more, which is good in that maze. `dydiff sampler-quality` measures it on other models.

    Raises:
        DydiffError: fewer than 2 evaluations, or a warm start without noise.
    """

    first_evaluations: int = 8
    warm_sigma: float = 0.8
    warm_evaluations: int = 3

    def __post_init__(self):
        if min(self.first_evaluations, self.warm_evaluations) < 2:
            raise DydiffError(
                f"Fast mode needs at least 2 network evaluations in every iteration, not {self.first_evaluations} in the first "
                f"and {self.warm_evaluations} in later ones."
            )
        if not self.warm_sigma > 0:
            raise DydiffError(f"Fast mode's warm_sigma must be above 0, not {self.warm_sigma}.")

    def sample(
        self,
        denoiser: Denoiser | FusedDenoiser,
        shape: tuple[int, int, int],
        draw: Draw,
        first_observation: Tensor,
        actions: Tensor,
        guess: Tensor | None,
    ) -> Tensor:
        """`sample_fast` for one iteration of a rollout: the first one without a guess, later ones with it."""
        condition = first_observation, actions
        if guess is None:
            return sample_fast(denoiser, shape, draw, *condition, self.first_evaluations)
        return sample_fast(denoiser, shape, draw, *condition, self.warm_evaluations, guess, self.warm_sigma)


@torch.no_grad()
def sample_fast(
    denoiser: Denoiser | FusedDenoiser,
    shape: tuple[int, int, int],
    draw: Draw,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    evaluations: int = 20,
    guess: Tensor | None = None,
    sigma_start: float = 80.0,
    sigma_min: float = 0.002,
    rho: float = 20.0,
) -> Tensor:
    """Sample trajectories in model space with DPM-Solver++(2M): exactly `evaluations` network evaluations, one a step.

    Shapes: `shape` is (B, H, D); first_observation [B, O] and actions [B, H, A] overwrite row 0's observations and all actions
    after every update (None: left free); returns [B, H, D]. `draw` is called once. Starts from noise of level `sigma_start`, on
    `guess` [B, H, D] if that is given (warm start). Levels fall as in EDM's equation 5 and end at 0; the larger rho, the nearer
    are their steps to equal ones in ln(sigma), which suit this solver: on Gaussians of deviation 0.05 to 1, the deviation of
    20 evaluations is 2.8 % off at rho 20, 6.9 % at Heun's rho 7, and that of Heun without churn 2.7 % in 67.

    With lambda = -ln(sigma) and h = ln(sigma / sigma_next), a step is (arXiv 2211.01095, algorithm 2 with alpha = 1)
        x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D',    D' = D + (D - D_previous) h / (2 h_previous)
    The first step has no past and the last one, where h is infinite, returns the denoised x: both take D' = D.

    Raises:
        DydiffError: fewer than 2 evaluations, or sigma_start not above sigma_min.
    """
    if evaluations < 2 or not sigma_start > sigma_min:
        raise DydiffError(
            f"Fast sampling needs at least 2 evaluations and a first noise level above sigma_min = {sigma_min}, "
            f"not {evaluations} evaluations from {sigma_start}."
        )
    schedule = reference.noise_schedule(evaluations, sigma_min, sigma_start, rho)
    x = draw(shape) * schedule[0]
    x = reference.inpaint(x if guess is None else x + guess, first_observation, actions)
    denoised_before = step_before = None
    for sigma, sigma_next in zip(schedule, schedule[1:], strict=False):
        c_skip, c_out, c_in = reference.precondition(sigma, denoiser.sigma_data)
        denoised = c_skip * x + c_out * denoiser.evaluate(c_in * x, sigma)
        step = math.log(sigma / sigma_next) if sigma_next else math.inf
        direction = denoised
        if denoised_before is not None and sigma_next:
            direction = torch.lerp(denoised_before, denoised, 1 + step / (2 * step_before))  # beyond 1 lerp extrapolates
        x = reference.inpaint(torch.lerp(x, direction, 1 - sigma_next / sigma), first_observation, actions)
        denoised_before, step_before = denoised, step
    return x
