"""A job's parameters and optimizer state: flat arrays, their versions, and who may look at them when."""

from __future__ import annotations

from optserve.server.store.access import Hold
from optserve.server.store.state import StoreState
from optserve.server.store.store import Store

__all__ = ["Hold", "Store", "StoreState"]
