"""Every kernel in plain PyTorch: the specification, the path taken without a compiled one, and the oracle of the tests.

EDM sampler step (Karras et al. 2022, arXiv 2206.00364, algorithm 2) on trajectories `[B, H, D]`, observation columns
first, `D = O + A`. The functions keep the dtype and the device of their input: float64 makes them an oracle. Noise
levels are host numbers, so nothing here ever waits for a device.
"""

from __future__ import annotations

import math

from torch import Tensor


def noise_schedule(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """The falling noise levels t_0 .. t_N, the last one 0: `num_steps + 1` numbers (EDM equation 5).

    num_steps must be at least 2.
    """
    if num_steps < 2:
        raise ValueError(f"a noise schedule needs at least 2 steps, not {num_steps}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / (num_steps - 1) * (bottom - top)) ** rho for i in range(num_steps)] + [0.0]


def churned(sigma: float, num_steps: int, s_churn: float, s_min: float, s_max: float) -> float:
    """The raised noise level sigma_hat at which a step starts; sigma outside [s_min, s_max] (EDM algorithm 2)."""
    gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
    return sigma * (1 + gamma)


def precondition(sigma: float, sigma_data: float = 0.5) -> tuple[float, float, float]:
    """c_skip, c_out, c_in of the denoiser D(x; sigma) = c_skip x + c_out F(c_in x) (EDM table 1)."""
    total = math.hypot(sigma, sigma_data)
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total


def inpaint(x: Tensor, first_observation: Tensor | None, actions: Tensor | None) -> Tensor:
    """A copy of x [B, H, D] with row 0's observation columns and all action columns overwritten by what is given.

    first_observation [B, O] and actions [B, H, A] may each be None, which leaves that part as it is.
    """
    x = x.clone()
    if first_observation is not None:
        x[:, 0, : first_observation.shape[-1]] = first_observation
    if actions is not None:
        x[:, :, x.shape[-1] - actions.shape[-1] :] = actions
    return x


def churn_step(
    x: Tensor, noise: Tensor, sigma: float, sigma_hat: float, s_noise: float, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Raises the noise of x from sigma to sigma_hat; returns x_hat, which is not inpainted, and the network's input.

    x, noise (standard normal) and both results are [B, H, D].
    """
    _, _, c_in = precondition(sigma_hat, sigma_data)
    x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * noise
    return x_hat, c_in * x_hat


def euler_step(
    x_hat: Tensor,
    network_output: Tensor,
    sigma_hat: float,
    sigma_next: float,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor | None]:
    """Goes from x_hat at sigma_hat straight to sigma_next and inpaints; returns x and the network's input there.

    x_hat, network_output (F, before preconditioning) and the results are [B, H, D]; first_observation [B, O] and
    actions [B, H, A] may be None. At sigma_next = 0 no evaluation follows and the second result is None.
    """
    c_skip, c_out, _ = precondition(sigma_hat, sigma_data)
    denoised = c_skip * x_hat + c_out * network_output
    slope = (x_hat - denoised) / sigma_hat
    x = inpaint(x_hat + (sigma_next - sigma_hat) * slope, first_observation, actions)
    if sigma_next == 0:
        return x, None
    _, _, c_in = precondition(sigma_next, sigma_data)
    return x, c_in * x


def heun_step(
    x_hat: Tensor,
    x: Tensor,
    network_output: Tensor,
    sigma_hat: float,
    sigma_next: float,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    sigma_data: float = 0.5,
) -> Tensor:
    """Repeats the step from x_hat with the mean of the slopes at both ends and inpaints; returns the new x [B, H, D].

    x is what `euler_step` returned for the same x_hat, noise levels and conditioning, network_output the raw network
    there. The first slope is read back from x: no third tensor is kept. It is lost where x was inpainted, and there the
    result is inpainted too. sigma_next must be positive.
    """
    step = sigma_next - sigma_hat
    c_skip, c_out, _ = precondition(sigma_next, sigma_data)
    denoised = c_skip * x + c_out * network_output
    first_slope = (x - x_hat) / step
    second_slope = (x - denoised) / sigma_next
    return inpaint(x_hat + step * (first_slope + second_slope) / 2, first_observation, actions)
