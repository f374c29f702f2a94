"""Progress bars with an ETA that also read well in a log file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SHOWN = ("evaluation/return", "evaluation/normalized_score", "rollout/score", "holdout_error", "best_holdout_error", "loss")

# By default tqdm makes a system-wide semaphore, which a killed process leaves behind.
tqdm.set_lock(threading.RLock())


def say(text: str) -> None:
    """Print a line without tearing a bar."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """One bar for one run: `begin` sets its length and where it starts, `advance` moves it, `watch` adds each epoch's figures.

    `tell` shows what goes on meanwhile, until it moves again.
    """

    def __init__(self, label: str):
        self.label = label
        self._bar: tqdm | None = None
        self._figures = ""

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        # On a terminal the bar is redrawn often; in a log file every redraw is a line.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(total=total, initial=done, desc=self.label, unit=f" {unit}", mininterval=interval, dynamic_ncols=True)

    def tell(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(part for part in (self._figures, text) if part))

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(count)

    def watch(self, stage: Any, one_by_one: bool) -> Callable[[dict[str, float]], None]:
        """A callback for `runs.drive`; `one_by_one` advances the bar by an epoch, otherwise the stage advances it itself."""

        def on_epoch(record: dict[str, float]) -> None:
            figures = {name.split("/")[-1]: f"{record[name]:.4g}" for name in SHOWN if name in record}
            if self._bar is not None:
                self._figures = ", ".join(f"{name}={value}" for name, value in {"epoch": stage.epoch, **figures}.items())
                self._bar.set_postfix_str(self._figures, refresh=False)
            if one_by_one:
                self.advance(1)

        return on_epoch

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
