"""Weights & Biases beside the run folder's own logs, for those who ask for it: `DYDIFF_WANDB=1` in the environment.

Everything else is W&B's to read there: WANDB_PROJECT (by default dydiff), WANDB_ENTITY, WANDB_MODE=offline, and so on. It only
looks on: once it has begun, what fails in it never ends a training.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dydiff.checkpoint import write_atomically
from dydiff.errors import DydiffError

ID = "wandb.id"  # in the run folder: a resumed run goes on in the same one


def is_asked_for() -> bool:
    """Whether the environment asks for Weights & Biases."""
    return os.environ.get("DYDIFF_WANDB", "0") not in ("", "0")


class Tracking:
    """One run at Weights & Biases, with its settings as the configuration; `group` is the experiment's name.

    Raises:
        DydiffError: the package is missing, or W&B does not begin.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], group: str | None):
        try:
            import wandb
        except ImportError as error:
            raise DydiffError(
                'DYDIFF_WANDB is set, but the package wandb does not import here. Run `pip install "dydiff[wandb]"`, or unset it.'
            ) from error
        file = folder / ID
        identity = file.read_text() if file.is_file() else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dydiff"),
                name=folder.name,
                group=group,
                id=identity,
                resume="allow",
                reinit="create_new",  # several seeds that train together are as many runs of one process
                dir=folder,
                config=settings,
            )
            self._run.define_metric("*", step_metric="epoch")  # a resumed run repeats the epochs behind its last state
        except Exception as error:  # whatever network, account or configuration bring about
            raise DydiffError(
                f"Weights & Biases does not begin ({_first_line(error)}). Run `wandb login`, set WANDB_MODE=offline, or unset "
                "DYDIFF_WANDB."
            ) from error
        write_atomically(file, lambda path: path.write_text(identity))

    def log(self, epoch: int, record: dict[str, float]) -> None:
        """Add the numbers of an epoch."""
        self._attempt(lambda: self._run.log({"epoch": epoch, **record}))

    def close(self, status: str) -> None:
        """Send what is left and say how the run ended."""
        self._attempt(lambda: self._run.finish(exit_code=0 if status == "finished" else 1))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            message = f"Weights & Biases failed ({_first_line(error)}); the run folder's own logs are complete."
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
