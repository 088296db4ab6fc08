"""Rows of parameters that are pulled without the rest of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optserve.client import _sparse
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes, rows
from optserve.wire.errors import InvalidArgumentError, ProtocolViolationError
from optserve.wire.layout import Layout, Place

Array = npt.NDArray[np.generic]
RowIds = Mapping[str, npt.ArrayLike]
"""Numbers of rows by parameter, 1-D, in any order; they may repeat."""


@dataclass(frozen=True)
class _Asked:
    """Rows of one parameter: `ids[inverse]` are those that the caller wants; None: the ids themselves are."""

    place: Place
    ids: npt.NDArray[np.int64]
    inverse: npt.NDArray[np.intp] | None
    shape: tuple[int, ...]

    def taken(self, values: Array) -> Array:
        """The caller's rows, in the parameter's dtype, of those that came as reals. A view, where no row is moved."""
        shaped = values.reshape(-1).view(self.place.dtype).reshape(self.ids.size, *self.place.shape[1:])
        return shaped if self.inverse is None else shaped.take(self.inverse, axis=0)


class PulledRows:
    """What is asked for, and what came of it."""

    def __init__(self, layout: Layout, wanted: RowIds | None) -> None:
        """UnknownParameterError, ShapeMismatchError for a scalar, InvalidArgumentError for what is no number of a row."""
        if wanted is not None and not isinstance(wanted, Mapping):
            raise InvalidArgumentError(f"rows must be a dict of names to numbers of rows; got {type(wanted).__name__}")
        self._layout = layout
        self._asked = {name: _asked(layout.place(name), ids) for name, ids in (wanted or {}).items()}
        self._receiver: rows.Receiver | None = None

    @property
    def names(self) -> list[str]:
        return list(self._asked)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the caller's arrays."""
        return {name: asked.shape for name, asked in self._asked.items()}

    def to_proto(self) -> list[pb.Rows]:
        """As they are asked for. InvalidArgumentError for more rows than one request can name."""
        return [rows.to_deltas(asked.place.index, asked.ids) for asked in self._asked.values()]

    def receiver(self, entries: Sequence[pb.RowsEntry]) -> rows.Receiver:
        """For the bundle that the entries announce. ProtocolViolationError if that is not what was asked for."""
        announced = sorted((entry.parameter, entry.count, entry.dtype) for entry in entries)
        places = [(asked.place, asked.ids.size) for asked in self._asked.values()]
        expected = sorted((place.index, count, dtypes.to_wire(place.dtype)) for place, count in places)
        if announced != expected:
            raise ProtocolViolationError(f"rows {announced} were announced; {expected} were asked for (parameter, rows, dtype)")
        self._receiver = rows.Receiver(rows.table(self._layout, entries))
        return self._receiver

    def check(self) -> None:
        """Once all has come: ProtocolViolationError if these are other rows than were asked for."""
        for place, ids, _ in self._entries():
            if not np.array_equal(ids, self._asked[place.name].ids):
                raise ProtocolViolationError(f"other rows of {place.name!r} came than were asked for")

    def arrays(self) -> dict[str, Array]:
        """What came, by name."""
        return {place.name: self._asked[place.name].taken(values) for place, _, values in self._entries()}

    def _entries(self) -> list[tuple[Place, npt.NDArray[np.int64], Array]]:
        return [] if self._receiver is None else self._receiver.entries()


def _asked(place: Place, given: npt.ArrayLike) -> _Asked:
    ids = _sparse.row_ids(place, given, f"the rows of {place.name!r}")
    shape = (ids.size, *place.shape[1:])
    if bool((ids[1:] > ids[:-1]).all()):
        return _Asked(place, ids, None, shape)
    distinct, inverse = np.unique(ids, return_inverse=True)
    return _Asked(place, distinct, inverse, shape)
