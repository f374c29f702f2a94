"""The fitting of a one-step model, dynamics or reward: held-out set, early stopping, every network's best weights."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from dydiff.capture import capture_if_gpu
from dydiff.data.transitions import Transitions
from dydiff.errors import DydiffError, NotFinite
from dydiff.finite import find_not_finite


class OneStepModel(Protocol):
    """What the fit needs of a model: E networks (E may be 1) that map observation and action to a target."""

    num_nets: int

    def target(self, batch: Transitions) -> Tensor: ...
    def loss(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor: ...
    def error_per_network(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor: ...
    def parameter_groups(self) -> list[dict]: ...
    def tensors_per_network(self) -> list[Tensor]: ...
    def set_elites(self, error: Tensor) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, tree: dict[str, Tensor]) -> object: ...


class Fit:
    """Early-stopped training, one `run_epoch` at a time (SPEC section 4).

    `data` holds float32 tensors in policy space on the model's device; batches are gathered there. `min(0.2 N, 5000)`
    rows are held out. With `bootstrap`, every network sees its own resampling (with replacement, drawn once) of the
    other rows. A network improves when its held-out error falls strictly below its best; `finished` is true when none
    did for `patience` epochs, or after `max_epochs`. The best weights of each network are copies taken at the epoch
    of its smallest error; when the fit finishes they go into the model, and the elites are chosen by those errors.
    `steps_per_epoch` cuts an epoch short (None: every row once). `generator`, a CPU generator, is the only source of
    randomness and part of `state_dict`.

    Raises:
        DydiffError: fewer than two rows.
        NotFinite: from `run_epoch`, a loss or a held-out error that is not finite.
    """

    def __init__(
        self,
        model: OneStepModel,
        data: Transitions,
        generator: torch.Generator,
        bootstrap: bool,
        lr: float = 1e-4,
        batch_size: int = 256,
        max_holdout: int = 5000,
        patience: int = 7,
        max_epochs: int = 1000,
        steps_per_epoch: int | None = None,
    ):
        num_rows = len(data.observation)
        if num_rows < 2:
            raise DydiffError(f"A one-step model needs at least 2 transitions (one is held out), but got {num_rows}.")
        self.model = model
        self.data = data
        self.generator = generator
        self.bootstrap = bootstrap
        self.batch_size = batch_size
        self.patience = patience
        self.max_epochs = max_epochs
        self.steps_per_epoch = steps_per_epoch
        self.optimizer = torch.optim.Adam(model.parameter_groups(), lr=lr, fused=True)

        num_holdout = max(1, min(int(0.2 * num_rows), max_holdout))
        self.split_seed = int(torch.randint(2**62, (), generator=generator))
        self.num_holdout = num_holdout
        self._split()

        self._gradients = capture_if_gpu(self._find_gradients, self.device)
        self.epoch = 0
        self.step = 0
        self.epochs_without_improvement = 0
        self.best_error = torch.full((model.num_nets,), math.inf, device=self.device)
        self.best = [tensor.clone() for tensor in model.tensors_per_network()]

    @property
    def device(self) -> torch.device:
        return self.data.observation.device

    @property
    def finished(self) -> bool:
        return self.epochs_without_improvement >= self.patience or self.epoch >= self.max_epochs

    def _split(self) -> None:
        """Hold rows out and draw the bootstrap tables, all from `split_seed`: a checkpoint need not hold them."""
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(len(self.data.observation), generator=generator)
        self.holdout = order[: self.num_holdout].to(self.device)
        rows = order[self.num_holdout :]  # [n]
        if self.bootstrap:
            choice = torch.randint(len(rows), (self.model.num_nets, len(rows)), generator=generator)
            rows = rows[choice]  # [E, n]
        self.rows = rows.to(torch.int32).to(self.device)  # int32: a million rows x 7 networks stay at 28 MB

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch, measure the held-out error, keep what improved; returns the figures of the epoch."""
        num_rows = self.rows.shape[-1]
        batch_size = min(self.batch_size, num_rows)
        num_steps = num_rows // batch_size  # the ragged tail waits for the next epoch's order
        if self.steps_per_epoch is not None:
            num_steps = min(num_steps, self.steps_per_epoch)
        # Bootstrap columns are independent between networks, so one order serves all of them.
        order = torch.randperm(num_rows, generator=self.generator)[: num_steps * batch_size].to(self.device)
        losses = torch.empty(num_steps, device=self.device)
        for i, columns in enumerate(order.split(batch_size)):
            (losses[i],) = self._gradients(columns)
            self.optimizer.step()
        self._check_losses(losses)
        self.step += num_steps
        error, improved = self._measure()
        self.epoch += 1
        self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        if self.finished:
            self.load_best()
        return {
            "epoch": self.epoch,
            "train_loss": float(losses.mean()),
            "holdout_error": float(error.mean()),
            "best_holdout_error": float(self.best_error.mean()),
            "epochs_without_improvement": self.epochs_without_improvement,
        }

    def load_best(self) -> None:
        """Put every network's best weights into the model and choose the elites; called when the fit finishes."""
        for tensor, best in zip(self.model.tensors_per_network(), self.best, strict=True):
            tensor.copy_(best)
        self.model.set_elites(self.best_error)

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observation, action and target of `rows [B]` or `[E, B]`."""
        batch = Transitions(*(column[rows] for column in self.data))
        return batch.observation, batch.action, self.model.target(batch)

    def _find_gradients(self, columns: Tensor) -> tuple[Tensor]:
        """The loss of a batch, `columns [B]` of `rows`; leaves the gradients with the weights. On a GPU it is captured."""
        self.optimizer.zero_grad()
        loss = self.model.loss(*self._gather(self.rows[..., columns].long()))
        loss.backward()
        return (loss.detach(),)

    @torch.no_grad()
    def _measure(self) -> tuple[Tensor, bool]:
        """Held-out error `[E]` and whether any network improved; copies the weights of those that did."""
        error = self.model.error_per_network(*self._gather(self.holdout))
        if not bool(error.isfinite().all()):
            raise NotFinite(self._diagnosis("held-out error", self.step))
        improved = error < self.best_error
        for tensor, best in zip(self.model.tensors_per_network(), self.best, strict=True):
            mask = improved.view(-1, *[1] * (tensor.dim() - 1))
            best.copy_(torch.where(mask, tensor, best))
        self.best_error = torch.where(improved, error, self.best_error)
        return error, bool(improved.any())

    def _check_losses(self, losses: Tensor) -> None:
        """One look at the device per epoch: the first step whose loss is not finite stops the fit."""
        finite = losses.isfinite()
        if not bool(finite.all()):
            raise NotFinite(self._diagnosis("training loss", self.step + int(finite.logical_not().nonzero()[0]) + 1))

    def _diagnosis(self, what: str, step: int) -> str:
        """Say which tensor is to blame: columns of the data, or else the weights."""
        head = f"The {what} of {type(self.model).__name__} is not finite at step {step} (epoch {self.epoch + 1}). "
        target = self.model.target(self.data).reshape(len(self.data.observation), -1)
        used = torch.cat([self.data.observation, self.data.action, target], dim=-1)
        bad = used.isfinite().all(dim=-1).logical_not().nonzero()
        if not len(bad):
            weight = find_not_finite(self.model.state_dict())
            which = f", first '{weight}'" if weight else ""
            return (
                f"{head}The data are finite, so the weights diverged{which}: lower the learning rate, or look for extreme "
                "rewards or observations."
            )
        row = int(bad[0])
        columns = [name for name, column in self.data._asdict().items() if not bool(column[row].isfinite().all())]
        return f"{head}The data hold a NaN or an infinity, first in row {row} ({', '.join(columns)}): repair the dataset."

    def state_dict(self) -> dict:
        """Everything that an exact continuation needs, apart from the data, as a tree of tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "best": self.best,
            "best_error": self.best_error,
            "split_seed": self.split_seed,
            "num_rows": len(self.data.observation),
            "epoch": self.epoch,
            "step": self.step,
            "epochs_without_improvement": self.epochs_without_improvement,
        }

    def load_state_dict(self, tree: dict) -> None:
        """Continue where `state_dict` was taken; DydiffError when the data are not those it was taken with."""
        num_rows = len(self.data.observation)
        if tree["num_rows"] != num_rows:
            raise DydiffError(
                f"The checkpoint was made with {tree['num_rows']} transitions but the dataset now gives {num_rows}: "
                "resume with the same dataset, or start a new run."
            )
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.generator.set_state(tree["generator"].cpu())
        for best, saved in zip(self.best, tree["best"], strict=True):
            best.copy_(saved)
        self.best_error = tree["best_error"].to(self.device)
        self.split_seed = tree["split_seed"]
        self.epoch = tree["epoch"]
        self.step = tree["step"]
        self.epochs_without_improvement = tree["epochs_without_improvement"]
        self._split()
        self._gradients = capture_if_gpu(self._find_gradients, self.device)  # a graph would read the rows of before
