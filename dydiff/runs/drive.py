"""The driver of every training: resume, log, save, and stop on signals so that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from dydiff.errors import DydiffError, Interrupted, NotFinite
from dydiff.memory import is_out_of_memory
from dydiff.runs import Run, Stage

LONG, SHARE = 1.0, 0.05  # seconds from which on saving takes long, and the share of the time that it may then take


class Interrupts:
    """Turn signals that ask for the end into a flag, looked at between pieces of work, so that a stop loses nothing."""

    def __enter__(self) -> Interrupts:
        self.received: int | None = None
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What nohup and background shells have ignored stays ignored.
        heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in heeded}
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:  # a second one means now
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(OSError):  # to the file itself: the signal may have come in the middle of a print
            os.write(2, b"\nStopping as soon as what is under way can be saved. A second signal stops at once, without saving.\n")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def drive(
    stage: Stage,
    run: Run,
    save_every: int,
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Train a stage to its end inside a run folder: resume, log every epoch, save every `save_every` epochs and on signals.

    The state is saved before the first epoch too, so that there always is one from before a failure. Where saving takes long,
    epochs that are due are passed over, so that training spends little of its time on it. `on_epoch` is called with each record
    that is logged, `on_start` once the stage is where it goes on from.

    Raises:
        Interrupted: a signal asked for the end; the state is saved and the run can be resumed.
        NotFinite: as the stage raises it, with the epoch of the saved state.
        DydiffError: whatever the stage raises about its data; the memory does not suffice; the disk is full.
    """
    status = "failed"
    try:
        saved = run.restore(stage)
        on_start()
        if stage.finished:  # killed between its last state and its end, or resumed for no longer than it ran
            stage.save_products(run.save, final=True)
        pause, last = 0.0, time.monotonic()
        with Interrupts() as interrupts:
            while not stage.finished:
                record = _run_epoch(stage, run, saved)
                stopped_by = interrupts.received
                due = stage.epoch % save_every == 0 and time.monotonic() - last >= pause
                saving = stopped_by is not None or stage.finished or due
                records = stage.late_records(wait=saving) if record is None else [(stage.epoch, record)]
                for epoch, complete in records:
                    run.log(epoch, complete)
                    on_epoch(complete)
                stage.save_products(run.save, final=stage.finished)
                if saving:
                    began = time.monotonic()
                    saved = run.save_state(stage)
                    last = time.monotonic()
                    pause = (last - began) / SHARE if last - began > LONG else 0.0
                if stopped_by is not None and not stage.finished:
                    status = "interrupted"
                    name = signal.Signals(stopped_by).name
                    raise Interrupted(f"Stopped by {name} after epoch {stage.epoch}; the state is saved in '{run.folder}'.")
            run.close("finished")  # here still, where a signal that comes now changes nothing
    except BaseException as error:
        with contextlib.suppress(DydiffError):  # what keeps the status from being written says the first error already
            run.close("interrupted" if isinstance(error, KeyboardInterrupt) else status)
        raise


def _run_epoch(stage: Stage, run: Run, saved: int) -> dict[str, float] | None:
    """One epoch; what ends the run there says where it can be taken up again."""
    try:
        return stage.run_epoch()
    except NotFinite as error:
        raise NotFinite(f"{error} The state after epoch {saved}, from before this, is kept in '{run.folder}'.") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DydiffError(
            f"Out of memory in epoch {stage.epoch + 1} ({' '.join(str(error).split())[:200]}). The state after epoch {saved} is "
            f"kept in '{run.folder}': end what else runs on the device and continue with --resume, or start anew with smaller "
            "batches (batch_size; --batch-gpu for a diffusion model)."
        ) from error
