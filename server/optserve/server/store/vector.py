"""All parameters of a job as one vector of reals: in torch's order, complex numbers as pairs, without the padding between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.store.column import Column
from optserve.server.store.extras import vector_dtype, vector_length
from optserve.wire import rows
from optserve.wire.layout import Layout, Place
from optserve.wire.rows import Rows, Sums

FlatArray = npt.NDArray[Any]


class Vector:
    """Between the vector and the flat arrays. Not thread safe: the store's lock guards the columns."""

    def __init__(self, layout: Layout, columns: Sequence[Column], backend: Backend) -> None:
        self._columns, self.backend = columns, backend
        self.length, self.dtype = vector_length(layout), vector_dtype(layout)
        ends = np.cumsum([0, *(place.size for place in layout.places)]).tolist()
        self._parts = [(place, slice(begin, end)) for place, begin, end in zip(layout.places, ends[:-1], ends[1:], strict=True)]

    def masters(self) -> FlatArray:
        """A copy, in state memory."""
        x = self.backend.zeros(self.length, self.dtype)

        def work() -> None:
            for place, where in self._parts:
                x[where] = self._columns[place.array_id].masters[place.offset : place.offset + place.size]

        self.backend.run(work)
        return x

    def adopt(self, x: FlatArray) -> None:
        """Makes a vector in host memory the masters, and the weights."""
        for place, where in self._parts:
            column = self._columns[place.array_id]
            self.backend.write(column.masters[place.offset : place.offset + place.size], x[where])
        for column in self._columns:
            column.is_sealed = True
            if column.masters is not column.weights:
                self.backend.publish(column.masters, column.weights)

    def weights(self, x: FlatArray, into: Mapping[int, FlatArray]) -> None:
        """Narrows a vector in host memory into flat arrays of the wire dtypes; their padding is left alone."""
        with np.errstate(all="ignore"):
            for place, where in self._parts:
                target = into[place.array_id][place.offset : place.offset + place.size]
                np.copyto(target, x[where], casting="unsafe")

    def gradient(self, sums: Sums, scale: float, absent: frozenset[int]) -> FlatArray:
        """`sums` times `scale` in state memory, 0 for those in `absent`. InvalidArgumentError if an array is missing."""
        g = self.backend.zeros(self.length, self.dtype)
        present = [(place, where) for place, where in self._parts if place.index not in absent]
        given = {array_id: self.backend.place(array) for array_id, array in sums.dense.items()}
        parts = [(where, self._part(place, sums, given), self._columns[place.array_id].state_dtype) for place, where in present]

        def work() -> None:
            with np.errstate(all="ignore"):
                for where, part, dtype in parts:
                    self.backend.xp.multiply(part, dtype.type(scale), out=g[where], dtype=dtype)

        self.backend.run(work)
        return g

    def _part(self, place: Place, sums: Sums, dense: Mapping[int, FlatArray]) -> FlatArray:
        """One parameter's sum in state memory."""
        column = self._columns[place.array_id]
        if place.index in sums.sparse:
            return self.backend.place(_whole(place, sums.sparse[place.index], column.state_dtype))
        return column.checked(dense.get(place.array_id))[place.offset : place.offset + place.size]


def _whole(place: Place, given: Rows, dtype: np.dtype[Any]) -> FlatArray:
    """A parameter's gradient of some rows as a dense one, flat."""
    found = np.zeros((rows.row_count(place), rows.row_size(place)), dtype)
    found[given.ids] = given.values.reshape(len(given.ids), rows.row_size(place))
    return found.reshape(-1)
