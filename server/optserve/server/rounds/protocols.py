"""What the rounds room asks of the rooms above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from optserve.server.records import Position, Record


class Journal(Protocol):
    """Where records go before they are applied."""

    def append(self, record: Record) -> None:
        """Returns when the record is as durable as the level promises. StorageError: it must not be applied."""


class Events(Protocol):
    """Who is told what happened: the job's event log, later metrics and a dashboard."""

    def publish(self, kind: str, position: Position, message: str, fields: Mapping[str, str]) -> None:
        """Called with the job's lock held: must not block."""
