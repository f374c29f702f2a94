"""Training of the diffusion model: EDM loss, Adam with a learning-rate ramp, EMA of the weights (SPEC section 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from dydiff.capture import CapturedGraph, captures, warm_up
from dydiff.data import Windows
from dydiff.device import has_fast_bf16, keep_freed_memory, sum_in_float32
from dydiff.diffusion.edm import (
    Denoiser,
    ForeignActions,
    draw_foreign_actions,
    draw_sigma,
    edm_loss,
    show_foreign_actions,
)
from dydiff.diffusion.update import make_update
from dydiff.errors import DydiffError, NotFinite
from dydiff.finite import find_not_finite
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.winograd import SMALLEST_GROUP, TAPS
from dydiff.networks.training_unet import make_training_unet
from dydiff.networks.unet import UNet

EMA_RAMP = 0.05  # early on, the EMA's half-life is this fraction of the samples seen
PRECISIONS = ("auto", "float32", "bf16", "winograd")


class DiffusionTrainer:
    """Trains a denoiser on windows of the dataset, one tick (some thousand samples) at a time; a stage for `runs.drive`.

    `duration`, `tick`, `lr_ramp` and `half_life` count samples: the learning rate grows linearly over the first `lr_ramp`,
    `half_life` is that of the weights' moving average, which is the model. `micro_batch` splits a batch to save memory.
    `precision` is that of the matrix products: `float32`, or for UNet_RL only `bf16` (weights, their update and the loss stay
    float32), or on a CPU `winograd` (float32 with fewer multiplications, rounded to some 3e-5); `auto` takes bf16 where the
    processor multiplies it in hardware, and winograd on other CPUs. `foreign_actions` is the share of windows that show
    the network another window's later actions (`edm.show_foreign_actions`). `describe` is the manifest that is stored beside the
    weights, every `snapshot_ticks` ticks (0: only at the end).

    Raises:
        DydiffError: the precision does not suit the network.
        NotFinite: from `run_epoch`, a loss or a weight is not finite (names the number of samples seen, and the tensor).
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
        lr_ramp: float = 10e6,
        half_life: float = 0.5e6,
        micro_batch: int | None = None,
        snapshot_ticks: int = 0,
        use_cond: bool = True,
        cond_on_action: bool = True,
        on_batch: Callable[[int], None] = lambda samples: None,
        precision: str = "float32",
        foreign_actions: float = 0.0,
    ):
        self.denoiser = denoiser.train().requires_grad_(True)
        self.precision = choose_precision(precision, denoiser)
        # What computes: a U-Net that is made for training on this device, with the same weights; another network itself.
        self.learner, copies = denoiser, {}
        if isinstance(denoiser.network, UNet):
            network = make_training_unet(denoiser.network, self.precision)
            self.learner, copies = Denoiser(network, denoiser.observation_dim, denoiser.sigma_data), network.copies
        self.ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.windows = windows
        self.describe = describe
        self.batch_size = batch_size
        self.duration = duration
        self.tick = max(tick, batch_size)  # a tick without a batch would have no loss to log
        self.lr = lr
        self.lr_ramp = lr_ramp
        self.half_life = half_life
        self.micro_batch = min(micro_batch or batch_size, batch_size)
        self.snapshot_ticks = snapshot_ticks
        self.use_cond = use_cond
        self.cond_on_action = cond_on_action
        self.foreign_actions = foreign_actions
        self.on_batch = on_batch
        self.update = make_update(list(denoiser.parameters()), list(self.ema.parameters()), copies)
        if windows.device.type == "cpu":
            keep_freed_memory()
        self.generator = torch.Generator(windows.device).manual_seed(seed)
        self.captures = captures(windows.device)
        self._ready_to_capture = False
        self._graph: CapturedGraph | None = None
        self.epoch = 0  # ticks done
        self.seen = 0  # samples seen

    @property
    def finished(self) -> bool:
        return self.seen >= self.duration

    def run_epoch(self) -> dict[str, float]:
        """Train for one tick; returns its mean loss per element, the learning rate and the samples seen."""
        end = min((self.epoch + 1) * self.tick, self.duration)
        first = self.seen
        batches = max(math.ceil((end - first) / self.batch_size), 0)
        losses = torch.empty(batches, device=self.windows.device)
        for batch in range(batches):
            losses[batch] = self._step()
            self.on_batch(self.batch_size)
        self.epoch += 1
        self._check(losses, first)
        loss = float(losses.sum()) / max(batches, 1)
        return {"loss": loss, "lr": self.update.adam.param_groups[0]["lr"], "kimg": self.seen / 1000}

    def _check(self, losses: torch.Tensor, first: int) -> None:
        """One look at the device a tick: every batch's loss, beginning after `first` samples, and the weights they led to."""
        weight = find_not_finite(self.denoiser.state_dict())
        wrong = losses.isfinite().logical_not().nonzero().flatten().tolist()
        if not wrong and not weight:
            return
        what = f"The diffusion loss is {float(losses[wrong[0]])}" if wrong else "The diffusion model's weights are not finite"
        samples = first + (wrong[0] + 1) * self.batch_size if wrong else self.seen
        culprit = f"first in the tensor '{weight}'" if weight else "the weights are still finite"
        raise NotFinite(f"{what} after {samples:,} samples ({culprit}). Lower --lr, or check the dataset for outliers.")

    def _step(self) -> torch.Tensor:
        """One batch; returns the mean loss per element without waiting for the device."""
        with sum_in_float32():
            mean = self._run_graph() if self.captures else self._find_gradients()
        self.update.step(self.lr * min(self.seen / self.lr_ramp, 1), self._ema_rate())
        self.seen += self.batch_size
        return mean

    def _run_graph(self) -> torch.Tensor:
        """`_find_gradients` as one CUDA graph: hundreds of small kernels, which a batch of 8 would spend launching."""
        if not self._ready_to_capture:
            mean = warm_up(self._find_gradients, self.windows.device)
            self._ready_to_capture = True  # this step counts; the next one is captured
            return mean
        if self._graph is None:
            self._graph = CapturedGraph(self._find_gradients, self.windows.device, self.generator)
        return self._graph.replay()

    def _find_gradients(self) -> torch.Tensor:
        """Draw a batch, leave its gradients where the update takes them, and return the mean loss per element."""
        self.update.clear_gradients()
        generator, device = self.generator, self.windows.device
        mean = torch.zeros((), device=device)
        # Drawn for the whole batch, so that splitting it changes nothing.
        index = torch.randint(len(self.windows), (self.batch_size,), generator=generator, device=device)
        sigmas = draw_sigma(self.batch_size, generator)
        noises = torch.randn(self.batch_size, self.windows.horizon, self.windows.dim, generator=generator, device=device)
        foreign = None
        if self.foreign_actions:
            foreign = draw_foreign_actions(self.batch_size, self.windows.horizon, self.foreign_actions, generator)
        for first in range(0, self.batch_size, self.micro_batch):
            part = slice(first, first + self.micro_batch)
            clean = self.windows.gather(index[part])  # [B, H, D]
            shown, counted = None, None
            if foreign is not None:
                other, drawn = self.windows.gather(index.roll(1)[part]), ForeignActions(*(values[part] for values in foreign))
                shown, counted = show_foreign_actions(clean, other, drawn, self.denoiser.observation_dim)
            loss = edm_loss(self.learner, clean, sigmas[part], noises[part], self.use_cond, self.cond_on_action, shown)
            if counted is not None:
                loss = loss * counted
            (loss.sum() / self.batch_size).backward()
            mean += loss.detach().sum() / (self.batch_size * clean[0].numel())
        self.update.collect_gradients()
        return mean

    def _ema_rate(self) -> float:
        """How far the average moves to the weights after a batch; as far as they are after the first one."""
        half_life = min(self.half_life, EMA_RAMP * self.seen)
        return 1 - 0.5 ** (self.batch_size / max(half_life, 1e-8))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.update.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seen"] >= self.duration + self.batch_size:  # the last batch may go beyond the duration
            raise DydiffError(
                f"The saved training has seen {state['seen']} windows, more than the {self.duration} that were asked for. Resume "
                "it with a longer --duration."
            )
        self.epoch, self.seen = state["epoch"], state["seen"]
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema.load_state_dict(state["ema"])
        self.update.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def save_products(self, save: Callable[[str, str, Any, dict], None], final: bool) -> None:
        tree = {"weights": self.ema.network.state_dict(), "limits": self.windows.limits.state_dict()}
        if final:
            save("model.safetensors", "diffusion model", tree, self.describe)
        elif self.snapshot_ticks and self.epoch % self.snapshot_ticks == 0:
            save(f"snapshot-{self.seen // 1000:06d}.safetensors", "diffusion model", tree, self.describe)


def choose_precision(precision: str, denoiser: Denoiser) -> str:
    """The precision of the products that a name of `PRECISIONS` stands for with this network and device.

    Raises:
        DydiffError: unknown name, bf16 for another network than UNet_RL, or winograd where it cannot be computed.
    """
    if precision not in PRECISIONS:
        raise DydiffError(f"Precision '{precision}' is unknown; choose one of {', '.join(PRECISIONS)}.")
    network, device = denoiser.network, next(denoiser.parameters()).device
    fits = isinstance(network, UNet)
    obstacle = why_unavailable("cpu")
    if not fits or network.kernel_size != TAPS or device.type != "cpu":
        obstacle = f"it is for UNet_RL with kernels of {TAPS} taps on a CPU"
    elif network.smallest_group < SMALLEST_GROUP["winograd"]:
        obstacle = f"the network has norms over {network.smallest_group} elements, which blow up its rounding"
    if precision == "auto":
        if fits and has_fast_bf16(device):
            return "bf16"
        return "float32" if obstacle else "winograd"
    if precision == "bf16" and not fits:
        raise DydiffError("--precision bf16 is for UNet_RL only; use --precision auto or float32.")
    if precision == "winograd" and obstacle:
        raise DydiffError(f"--precision winograd cannot be used here: {obstacle.rstrip('.')}. Use --precision auto or float32.")
    return precision
