"""A job's parameters and optimizer state: flat arrays, their versions, and who may look at them when."""

from __future__ import annotations

from optserve.server.store.access import Hold
from optserve.server.store.search import Search
from optserve.server.store.state import StoreState
from optserve.server.store.store import Store
from optserve.server.store.window import Window

__all__ = ["Hold", "Search", "Store", "StoreState", "Window"]
