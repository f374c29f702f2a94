"""Training of the diffusion model: EDM loss, Adam with a learning-rate ramp, EMA of the weights (SPEC section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from dydiff.data import Windows
from dydiff.diffusion.edm import Denoiser, draw_sigma, edm_loss
from dydiff.errors import DydiffError

RAMP_SAMPLES = 10e6  # the learning rate grows linearly over the first 10 M samples
EMA_RAMP = 0.05  # early on, the EMA's half-life is this fraction of the samples seen
INFINITE_GRADIENT = 1e5  # what an infinite gradient becomes


class DiffusionTrainer:
    """Trains a denoiser on windows of the dataset, one tick (some thousand samples) at a time; a stage for `runs.drive`.

    `duration` and `tick` count samples; `half_life` is the EMA's in samples; `micro_batch` splits a batch to save memory;
    `describe` is the manifest that is stored beside the weights. The EMA weights are the model, which is
    written every `snapshot_ticks` ticks (0: only at the end).

    Raises:
        DydiffError: the loss is no longer finite (names the number of samples seen).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        windows: Windows,
        describe: dict[str, Any],
        batch_size: int,
        duration: int,
        tick: int,
        seed: int,
        lr: float = 1e-3,
        half_life: float = 0.5e6,
        micro_batch: int | None = None,
        snapshot_ticks: int = 0,
        use_cond: bool = True,
        cond_on_action: bool = True,
        on_batch: Callable[[int], None] = lambda samples: None,
    ):
        self.denoiser = denoiser.train().requires_grad_(True)
        self.ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.windows = windows
        self.describe = describe
        self.batch_size = batch_size
        self.duration = duration
        self.tick = max(tick, batch_size)  # a tick without a batch would have no loss to log
        self.lr = lr
        self.half_life = half_life
        self.micro_batch = min(micro_batch or batch_size, batch_size)
        self.snapshot_ticks = snapshot_ticks
        self.use_cond = use_cond
        self.cond_on_action = cond_on_action
        self.on_batch = on_batch
        self.optimizer = torch.optim.Adam(denoiser.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8)
        self.generator = torch.Generator(windows.device).manual_seed(seed)
        self.epoch = 0  # ticks done
        self.seen = 0  # samples seen

    @property
    def finished(self) -> bool:
        return self.seen >= self.duration

    def run_epoch(self) -> dict[str, float]:
        """Train for one tick; returns its mean loss per element, the learning rate and the samples seen."""
        end = min((self.epoch + 1) * self.tick, self.duration)
        total = torch.zeros((), device=self.windows.device)
        batches = 0
        while self.seen < end:
            total += self._step()
            batches += 1
            self.on_batch(self.batch_size)
        self.epoch += 1
        loss = float(total) / max(batches, 1)
        if not torch.isfinite(total):
            raise DydiffError(
                f"The diffusion loss is {loss} after {self.seen:,} samples. Lower --lr, or check the dataset for outliers; the "
                "last saved state of the run is from before this."
            )
        return {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], "kimg": self.seen / 1000}

    def _step(self) -> torch.Tensor:
        """One batch; returns the mean loss per element without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(self.seen / RAMP_SAMPLES, 1)
        self.optimizer.zero_grad(set_to_none=True)
        generator, device = self.generator, self.windows.device
        mean = torch.zeros((), device=device)
        # Drawn for the whole batch, so that splitting it changes nothing.
        index = torch.randint(len(self.windows), (self.batch_size,), generator=generator, device=device)
        sigmas = draw_sigma(self.batch_size, generator)
        noises = torch.randn(self.batch_size, self.windows.horizon, self.windows.dim, generator=generator, device=device)
        for rows, sigma, noise in zip(*(values.split(self.micro_batch) for values in (index, sigmas, noises)), strict=True):
            clean = self.windows.gather(rows)  # [B, H, D]
            loss = edm_loss(self.denoiser, clean, sigma, noise, self.use_cond, self.cond_on_action)
            (loss.sum() / self.batch_size).backward()
            mean += loss.detach().sum() / (self.batch_size * clean[0].numel())
        for parameter in self.denoiser.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=INFINITE_GRADIENT, neginf=-INFINITE_GRADIENT, out=parameter.grad)
        self.optimizer.step()
        self.seen += self.batch_size
        self._update_ema()
        return mean

    @torch.no_grad()
    def _update_ema(self) -> None:
        half_life = min(self.half_life, EMA_RAMP * self.seen)
        beta = 0.5 ** (self.batch_size / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.denoiser.parameters()), 1 - beta)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.seen = state["epoch"], state["seen"]
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def save_products(self, save: Callable[[str, str, Any, dict], None], final: bool) -> None:
        tree = {"weights": self.ema.network.state_dict(), "limits": self.windows.limits.state_dict()}
        if final:
            save("model.safetensors", "diffusion model", tree, self.describe)
        elif self.snapshot_ticks and self.epoch % self.snapshot_ticks == 0:
            save(f"snapshot-{self.seen // 1000:06d}.safetensors", "diffusion model", tree, self.describe)
