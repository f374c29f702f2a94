"""TensorBoard event files, written in the training's own thread: whole after every epoch, and a full disk shows at once."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path


class EventFile:
    """A new event file in `folder`; TensorBoard drops what earlier files say of `first_step` and the steps behind it.

    Raises:
        OSError: the file cannot be made; from `add`, it cannot be written.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115 - held for the life of the run
        self._records = RecordWriter(self._file)
        version = "brain.Event:2"
        self._write(Event(wall_time=time.time(), file_version=version))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, record: dict[str, float]) -> None:
        """Append the numbers of one step; when this returns, a reader finds them."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in record.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file; there is nothing left to write."""
        self._file.close()
