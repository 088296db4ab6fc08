"""One step of some rows of parameters: gathered into contiguous memory, stepped there block by block, and brought back.

All other rows keep their weights and their state, bit for bit, and are not looked at. The step is the parameter's, though: it
counts once, and what it carries as scalars is one for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optserve.server.backends import Backend, Kernel
from optserve.server.formulas import Group
from optserve.server.store.column import Column, FlatArray
from optserve.server.store.slots import allocated
from optserve.wire.errors import InvalidArgumentError
from optserve.wire.layout import Place
from optserve.wire.rows import Rows, checked_ids, row_size

HOST_BLOCK, DEVICE_BLOCK = 1 << 15, 1 << 22
"""Elements that are gathered at a time: what stays in a core's cache (measured: half as many take 1.2 times as long), and what
fills a device (not measured yet)."""


class RowEntry(NamedTuple):
    """What a step does to rows of a parameter, by its position in its column: its group's hyperparameters, the gradient."""

    column: Column
    position: int
    group: Group
    rows: Rows

    @property
    def place(self) -> Place:
        return self.column.places[self.position]


def check(entry: RowEntry) -> None:
    """InvalidArgumentError unless the rows are the parameter's, ascending and distinct, with values of the state dtype."""
    (ids, values), place = entry.rows, entry.place
    wanted = (len(ids), row_size(place))
    if not place.shape or values.shape != wanted or values.dtype != entry.column.state_dtype or ids.dtype != np.int64:
        raise InvalidArgumentError(
            f"rows of {place.name!r} came as {values.dtype} {values.shape} for {ids.shape} numbers of {ids.dtype}; "
            f"they must be {entry.column.state_dtype} {wanted} for as many of int64",
            parameter=place.name,
        )
    checked_ids(place, ids)
    if bool((ids[1:] <= ids[:-1]).any()):
        raise InvalidArgumentError(f"the numbers of the rows of {place.name!r} do not ascend", parameter=place.name)


def densified(entry: RowEntry, backend: Backend) -> FlatArray:
    """The gradient of the whole parameter, with the padding after it: state memory. OutOfMemoryError."""
    place, (begin, end) = entry.place, entry.column.bounds(entry.position)
    flat = allocated(backend.zeros, end - begin, entry.column.state_dtype, f"the gradient of {place.name!r}")
    ids, values = backend.place(entry.rows.ids), backend.place(entry.rows.values)
    backend.put_rows(values, ids, _matrix(flat[: place.size], place))
    return flat


def _matrix(array: FlatArray, place: Place) -> FlatArray:
    """A parameter's elements, a row of them for each of its rows."""
    return array.reshape(place.shape[0], row_size(place))


class Scratch(NamedTuple):
    """Contiguous memory for one block at a time."""

    masters: FlatArray
    slots: Sequence[FlatArray]
    weights: FlatArray | None


class Touched:
    """The rows of one parameter in one step, in state memory."""

    def __init__(self, entry: RowEntry, kernel: Kernel, slots: Sequence[FlatArray], backend: Backend) -> None:
        """`slots` are whole flat arrays. OutOfMemoryError."""
        self.entry, self.slot_count = entry, len(slots)
        self._kernel, self._backend = kernel, backend
        column, place = entry.column, entry.place
        where = slice(place.offset, place.offset + place.size)
        self._homes = [_matrix(array[where], place) for array in (column.masters, *slots)]
        self._weights = _matrix(column.weights[where], place)
        self._ids, self._values = backend.place(entry.rows.ids), backend.place(entry.rows.values.reshape(-1))

    @property
    def rows_in_block(self) -> int:
        size = HOST_BLOCK if self._backend.on_host else DEVICE_BLOCK
        return max(1, size // max(1, row_size(self.entry.place)))

    @property
    def block_size(self) -> int:
        """Elements of the largest block."""
        return min(self.rows_in_block, len(self.entry.rows.ids)) * row_size(self.entry.place)

    def scratch(self) -> Scratch:
        """OutOfMemoryError."""
        column, what = self.entry.column, f"rows of {self.entry.place.name!r}"
        masters, *slots = (
            allocated(self._backend.zeros, self.block_size, column.state_dtype, what) for _ in range(1 + self.slot_count)
        )
        narrow = column.narrow is not None
        return Scratch(
            masters, slots, allocated(self._backend.zeros, self.block_size, column.array.dtype, what) if narrow else None
        )

    def step(self, first: int, scratch: Scratch, scalars: Mapping[str, float], scale: float) -> None:
        """Of one block, from the first-th of the given rows."""
        last = min(first + self.rows_in_block, len(self.entry.rows.ids))
        width, ids = row_size(self.entry.place), self._ids[first:last]
        size, column = (last - first) * width, self.entry.column
        own = [array[:size] for array in (scratch.masters, *scratch.slots)]
        for home, part in zip(self._homes, own, strict=True):
            self._backend.take_rows(home, ids, part.reshape(last - first, width))
        weights = None if scratch.weights is None else scratch.weights[:size]
        self._kernel(own[0], self._values[first * width : last * width], own[1:], scalars, scale, weights)
        for home, part in zip(self._homes, own, strict=True):
            self._backend.put_rows(part.reshape(last - first, width), ids, home)
        if column.weights is not column.masters:
            computed = own[0] if weights is None else weights
            self._backend.publish_rows(computed.reshape(last - first, width), self.entry.rows.ids[first:last], self._weights)
