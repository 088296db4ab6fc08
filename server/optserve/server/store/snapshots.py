"""Immutable copies of the weights of one version, shared while someone keeps them."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

from optserve.server.store.access import Arrays
from optserve.server.store.column import copied


class _Snapshot(dict[int, npt.NDArray[np.generic]]):
    """A dict that can be weakly referenced."""


class Snapshots:
    """At most one copy at a time. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest
        self._last: weakref.ref[_Snapshot] | None = None
        self._version = -1

    def of(self, version: int, arrays: Arrays) -> Arrays:
        """The arrays of a version, which stay as they are during the call: the same object for all who ask while someone keeps
        it. OutOfMemoryError."""
        with self._lock:
            found = self._last() if self._last is not None else None
            if found is None or self._version != version:
                found = _Snapshot({array_id: copied(array) for array_id, array in arrays.items()})
                for array in found.values():
                    array.flags.writeable = False
                self._last, self._version = weakref.ref(found), version
            return found
