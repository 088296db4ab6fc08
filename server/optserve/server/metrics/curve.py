"""One job's event file. tensorboardX is imported here alone."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event as Entry  # pyright: ignore[reportAttributeAccessIssue] - made at run time
from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from optserve.server.metrics.points import Point


class Curve:
    """A new event file in `folder`. Every call may raise OSError. For one thread.

    Not tensorboardX's SummaryWriter: its thread dies of the first error of the disk, and then whoever writes waits for good.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take a folder's files in the order of their names.
        self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.optserve"))
        self._write(Entry(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, entry: Entry) -> None:
        self._writer.write(entry.SerializeToString())

    def add(self, point: Point) -> None:
        """Its values are float32 in the file, as TensorBoard has them."""
        if point.begins is not None:
            void = SessionLog(status=SessionLog.START)  # what SummaryWriter writes for its purge_step
            self._write(Entry(wall_time=point.time_seconds, step=point.begins, session_log=void))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
        self._write(Entry(wall_time=point.time_seconds, step=point.step, summary=Summary(value=values)))

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """The file is closed even where this fails."""
        self._writer.close()
