"""Where records go before they are applied. Until the log comes (part 6) there is only the journal that keeps nothing."""

from __future__ import annotations

from optserve.server.records import Record


class NullJournal:
    """State in memory only: what came after the last checkpoint is gone with the process."""

    def append(self, record: Record) -> None:
        """Keeps nothing."""
