"""Sparse gradients: each rank's bundle of rows is taken in whole and checked; at the decision the ranks' rows are added up.

Unlike blocks of flat arrays they are not folded as they come: so a rank that has sent only rows falls out without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from optserve.v1 import types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import Chunk, block_count
from optserve.wire.layout import Layout, Place
from optserve.wire.rows import Receiver, Rows, Span, checked_ids, row_size, summed, table

_MOST_REPEATS = 4
_SPARE_BYTES = 1 << 20
"""A bundle may hold every row of its parameters so many times, and so much more."""


class StagedRows:
    """One rank's bundle. The thread that reads the rank's stream fills it; `found` is there once it is whole and checked."""

    def __init__(self, layout: Layout, entries: Iterable[types_pb2.RowsEntry]) -> None:
        """Errors of wire.rows.table; DtypeMismatchError; InvalidArgumentError for more bytes than such a gradient needs."""
        entries = list(entries)
        spans = table(layout, entries)
        for span, entry in zip(spans, entries, strict=True):
            _check_dtype(span.place, dtypes.from_wire(entry.dtype, span.place.name))
        _check_size(spans)
        try:
            self._receiver: Receiver | None = Receiver(spans)
        except (MemoryError, ValueError) as error:  # a ValueError for more than an array can have
            raise errors.OutOfMemoryError(f"no memory for {spans[-1].end} bytes of rows") from error
        self.chunk_count = block_count(self._receiver.nbytes)
        self.found: Mapping[int, Rows] | None = None
        """By parameter index, in the state dtype."""
        if not self.missing:
            self.check(lambda _: True)

    @property
    def missing(self) -> int:
        """How many chunks are still to come."""
        return 0 if self._receiver is None else self._receiver.missing

    def add(self, chunk: Chunk) -> None:
        """InvalidChunkError if it is no block of the bundle, or came before."""
        if self._receiver is None:
            raise errors.InvalidChunkError(f"a chunk of rows begins at byte {chunk.offset}; all rows have come")
        self._receiver.add(chunk)

    def check(self, finite: Callable[[npt.NDArray[np.generic]], bool]) -> list[str]:
        """Checks a whole bundle and sums rows that repeat; the quoted names of parameters whose values are not finite.

        `finite` says so of reals of any wire dtype. InvalidArgumentError for a row that a parameter does not have.
        """
        found: dict[int, Rows] = {}
        odd: list[str] = []
        for place, ids, values in [] if self._receiver is None else self._receiver.entries():
            checked_ids(place, ids)
            if not finite(values.reshape(-1)):
                odd.append(repr(place.name))
            with np.errstate(all="ignore"):
                found[place.index] = summed(ids, values.astype(dtypes.state_dtype(_reals(place)), copy=False))
        self.found, self._receiver = found, None
        return odd


def added(parts: Sequence[tuple[float, Mapping[int, Rows]]]) -> dict[int, Rows]:
    """Σ ratio·rows in the order of the parts, by parameter index; a part has each row once. Nothing given is changed."""
    found: dict[int, Rows] = {}
    for index in sorted({index for _, rows in parts for index in rows}):
        own = [(ratio, rows[index]) for ratio, rows in parts if index in rows]
        found[index] = _scaled(*own[0]) if len(own) == 1 else _sum(own)
    return found


def _sum(parts: Sequence[tuple[float, Rows]]) -> Rows:
    ids = np.concatenate([rows.ids for _, rows in parts])
    ids.sort()
    ids = ids[np.append(True, ids[1:] != ids[:-1])[: ids.size]]
    first = parts[0][1].values
    total = np.zeros((ids.size, first.shape[1]), first.dtype)
    with np.errstate(all="ignore"):
        for ratio, rows in parts:
            where = np.searchsorted(ids, rows.ids)
            total[where] = total.take(where, axis=0) + _scaled(ratio, rows).values
    return Rows(ids, total)


def _scaled(ratio: float, rows: Rows) -> Rows:
    with np.errstate(all="ignore"):
        return rows if ratio == 1.0 else Rows(rows.ids, rows.values * rows.values.dtype.type(ratio))


def _reals(place: Place) -> np.dtype[np.generic]:
    return dtypes.storage_dtype(place.dtype)


def _check_dtype(place: Place, dtype: np.dtype[np.generic]) -> None:
    kind = "complex" if place.is_complex else "real"
    state = dtypes.state_dtype(_reals(place))
    if dtypes.is_complex(dtype) != place.is_complex or dtypes.storage_dtype(dtype).itemsize > state.itemsize:
        raise errors.DtypeMismatchError(
            f"the rows of {place.name!r} have dtype {dtype}; the parameter has dtype {place.dtype}, so they must be {kind}, of "
            f"{state.itemsize} bytes at most",
            parameter=place.name,
        )


def _check_size(spans: Sequence[Span]) -> None:
    widths = [8 + row_size(span.place) * dtypes.state_dtype(_reals(span.place)).itemsize for span in spans]
    limit = _SPARE_BYTES + _MOST_REPEATS * sum(span.place.shape[0] * width for span, width in zip(spans, widths, strict=True))
    nbytes = spans[-1].end if spans else 0
    if nbytes > limit:
        names = ", ".join(repr(span.place.name) for span in spans[:4])
        raise errors.InvalidArgumentError(
            f"the rows of {names} are announced with {nbytes} bytes; at most {limit} are taken: sum rows that repeat"
        )
