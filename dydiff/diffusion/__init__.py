"""The trajectory-diffusion model: preconditioning and loss, samplers, training."""
