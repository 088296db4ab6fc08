"""What the rounds room asks of the rooms above it."""

from __future__ import annotations

from typing import Protocol

from optserve.server.records import Record


class Journal(Protocol):
    """Where records go before they are applied."""

    def append(self, record: Record) -> None:
        """Returns when the record is as durable as the level promises. StorageError: it must not be applied.

        A round's gradients lie in arrays that the next round writes into: what is kept of them is copied before it returns.
        """
