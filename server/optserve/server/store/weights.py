"""The weights of one job: flat arrays, and the lock that says who may read or change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Optimizer
from optserve.server.store.access import Access, Arrays, Hold
from optserve.server.store.column import Column
from optserve.server.store.snapshots import Snapshots
from optserve.wire.errors import (
    DtypeMismatchError,
    InvalidArgumentError,
    InvalidChunkError,
    OutOfMemoryError,
    ShapeMismatchError,
    UnknownParameterError,
)
from optserve.wire.layout import Layout
from optserve.wire.rows import row_count, row_size
from optserve.wire.values import Value

FlatArray = npt.NDArray[Any]
Groups = Sequence[Mapping[str, Value]]

WAIT_SECONDS = 60.0


class Weights:
    """Thread safe. What is built on it changes the columns within `_changing` alone."""

    def __init__(self, optimizer: Optimizer, backend: Backend) -> None:
        self.optimizer = optimizer
        self.backend = backend
        self.layout = Layout()
        self.version = 0
        self._columns: list[Column] = []
        self._access = Access()  # guards everything of the store
        self._snapshots = Snapshots()

    def add_group(
        self,
        parameters: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]],
        timeout_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Adds zeros in place of the parameters, to be written block by block and sealed.

        Errors of Layout.extended; OutOfMemoryError. Then nothing is added.
        """
        with self._changing("adding a param group", timeout_seconds):
            group = 1 + max((array.group for array in self.layout.arrays), default=-1)
            layout = self.layout.extended(group, parameters)
            self._columns += [
                Column(array, [p for p in layout.places if p.array_id == array.array_id], self.optimizer, self.backend)
                for array in layout.arrays[len(self._columns) :]
            ]
            self.layout = layout

    def write_block(self, array_id: int, offset_bytes: int, data: memoryview, timeout_seconds: float = WAIT_SECONDS) -> None:
        """Initial values of an array that is not sealed yet. InvalidChunkError if they do not lie in it."""
        column = self._column(array_id)
        with self._changing("writing initial values", timeout_seconds):
            if column.is_sealed:
                raise InvalidChunkError(f"array {array_id} has its initial values already")
            if offset_bytes < 0 or offset_bytes + data.nbytes > column.weights.nbytes:
                raise InvalidChunkError(
                    f"{data.nbytes} bytes at {offset_bytes} do not lie in array {array_id} of {column.weights.nbytes} bytes"
                )
            target = column.weights.view(np.uint8)[offset_bytes : offset_bytes + data.nbytes]
            target[:] = np.frombuffer(data, np.uint8)

    def seal(self, timeout_seconds: float = WAIT_SECONDS) -> None:
        """The initial values of all arrays so far are complete."""
        with self._changing("sealing the initial values", timeout_seconds):
            for column in self._columns:
                if not column.is_sealed:
                    column.seal()

    def set_values(self, values: Mapping[str, FlatArray], timeout_seconds: float = WAIT_SECONDS) -> None:
        """Whole parameters. UnknownParameterError, ShapeMismatchError or DtypeMismatchError changes nothing."""
        for name, value in values.items():
            place = self.layout.place(name)
            if value.shape != place.shape:
                raise ShapeMismatchError(f"value {name!r} has shape {value.shape}; the parameter has shape {place.shape}")
            if value.dtype != place.dtype:
                raise DtypeMismatchError(f"value {name!r} has dtype {value.dtype}; the parameter has dtype {place.dtype}")
        with self._changing("setting values", timeout_seconds):
            for name, value in values.items():
                place = self.layout.place(name)
                self._columns[place.array_id].set_value(place, value)

    def hold(self, reader: str = "a reader", timeout_seconds: float = WAIT_SECONDS) -> Hold:
        """The weights as they are, until `release`: nothing is changed meanwhile. `reader` is what errors call the holder."""
        self._access.begin_reading(reader, timeout_seconds)
        arrays: Arrays = {column.array.array_id: column.readable for column in self._columns}
        return Hold(arrays, self.version, lambda: self._access.end_reading(reader))

    @contextmanager
    def reading(self, reader: str = "a reader", timeout_seconds: float = WAIT_SECONDS) -> Iterator[Arrays]:
        """`hold` as a context manager."""
        hold = self.hold(reader, timeout_seconds)
        try:
            yield hold.arrays
        finally:
            hold.release()

    def rows(self, index: int, ids: npt.NDArray[np.int64], timeout_seconds: float = WAIT_SECONDS) -> FlatArray:
        """Copies of these rows of the parameter with this index, in the wire dtype: each a row of reals. OutOfMemoryError."""
        place = self.layout.places[index]
        with self.reading("a pull of rows", timeout_seconds) as arrays:
            flat = arrays[place.array_id][place.offset : place.offset + place.size]
            try:
                # Rows that exist, each as a whole: fancy indexing takes four times as long.
                return flat.reshape(row_count(place), row_size(place)).take(ids, axis=0, mode="clip")
            except MemoryError as error:
                raise OutOfMemoryError(f"no memory for a copy of {ids.size} rows of {place.name!r}") from error

    def snapshot(self, timeout_seconds: float = WAIT_SECONDS) -> Arrays:
        """An immutable copy of the weights of one version, the same object for all who ask while someone keeps it."""
        with self.reading("a snapshot", timeout_seconds) as arrays:
            return self._snapshots.of(self.version, arrays)

    def _column(self, array_id: int) -> Column:
        if not 0 <= array_id < len(self._columns):
            raise UnknownParameterError(f"array {array_id} is not in the job; it has {len(self._columns)} arrays")
        return self._columns[array_id]

    @contextmanager
    def _changing(self, writer: str, timeout_seconds: float = WAIT_SECONDS) -> Iterator[None]:
        with self._access.writing(writer, timeout_seconds):
            self.version += 1
            yield

    def _check_groups(self, groups: Groups) -> None:
        if len(groups) <= max((column.array.group for column in self._columns), default=-1):
            raise InvalidArgumentError(f"{len(groups)} param groups were given; the job has more")
