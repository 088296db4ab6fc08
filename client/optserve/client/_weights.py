"""Weights into the caller's own arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from optserve.client._packing import Array
from optserve.client._pulled_rows import PulledRows, RowIds
from optserve.client._transport import refusal
from optserve.v1 import data_pb2
from optserve.wire.chunks import Chunk, Coverage, from_inline
from optserve.wire.errors import (
    DtypeMismatchError,
    InvalidArgumentError,
    ProtocolViolationError,
    ShapeMismatchError,
)
from optserve.wire.layout import Array as FlatArray
from optserve.wire.layout import Layout, Place
from optserve.wire.methods import Item
from optserve.wire.rows import ROWS_ARRAY_ID

Weights = dict[str, npt.NDArray[Any]]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Span:
    """Bytes begin..end of a flat array, and where they go."""

    begin: int
    end: int
    into: Bytes


class Destination:
    """Where the weights of a layout go: into `out`, or into new arrays.

    New arrays are views of one flat array for each (group, dtype), so that a chunk is one copy; a dict of them that is given
    back as `out` is recognised. What `out` lacks is added to it; what it has beyond the names asked for is left alone.
    Of the parameters in `rows` only these rows are taken, and arrays of them stand in the dict; nothing is made of the others.
    """

    def __init__(
        self, layout: Layout, names: Iterable[str] | None = None, out: Weights | None = None, rows: RowIds | None = None
    ) -> None:
        """UnknownParameterError for a name; for an array of `out` Shape-, DtypeMismatchError, InvalidArgumentError.

        `rows`: see PulledRows; in these parameters' place, whether `names` has them or not.
        """
        self.layout = layout
        self.filled = False
        """Whether the weights of this very layout came."""
        self.rows = PulledRows(layout, rows)
        self.asked = self.rows.to_proto()
        chosen = [place.name for place in layout.places] if names is None else [*names, *self.rows.names]
        self.names = list(dict.fromkeys(chosen))
        """In the order of the dict that is returned."""
        apart = self.rows.shapes
        self.places = tuple(layout.place(name) for name in self.names if name not in apart)
        """Of the parameters that come whole."""
        self._out: Weights = {} if out is None else out
        self._arrays: Weights = {place.name: self._out[place.name] for place in self.places if place.name in self._out}
        self._late: list[tuple[Array, Array]] = []
        self._counts = Counter(place.array_id for place in layout.places)
        for place in self.places:
            self._check(place, place.shape, "the parameter has")
        for name, shape in apart.items():
            self._check(layout.place(name), shape, "these rows have")
        self._spans = {array_id: self._array_spans(array_id, places) for array_id, places in self._by_array().items()}

    def coverage(self) -> dict[int, Coverage]:
        """The blocks that the server sends, by array."""
        wanted = self.layout.blocks_of([place.index for place in self.places])
        return {
            array.array_id: Coverage(f"array {array.array_id}", array.nbytes, wanted.get(array.array_id, ()))
            for array in self.layout.arrays
        }

    def write(self, chunk: Chunk) -> None:
        """Puts a chunk's bytes where they belong."""
        data = np.frombuffer(chunk.data, np.uint8)
        low, high = chunk.offset, chunk.offset + data.size
        for span in self._overlapping(chunk.array_id, low, high):
            begin, end = max(low, span.begin), min(high, span.end)
            span.into[begin - span.begin : end - span.begin] = data[begin - low : end - low]

    def finished(self) -> Weights:
        """The dict, filled."""
        for into, array in self._late:
            into[...] = array
        for name, rows in self.rows.arrays().items():
            if name in self._out:
                self._out[name][...] = rows
            self._arrays[name] = self._out.get(name, rows)
        self._out.update((name, self._arrays[name]) for name in self.names)
        return self._out

    def _overlapping(self, array_id: int, low: int, high: int) -> Iterable[_Span]:
        spans = self._spans[array_id]
        first, last = 0, len(spans)
        while first < last:
            middle = (first + last) // 2
            if spans[middle].end <= low:
                first = middle + 1
            else:
                last = middle
        while first < len(spans) and spans[first].begin < high:
            yield spans[first]
            first += 1

    def _check(self, place: Place, shape: tuple[int, ...], what: str) -> None:
        if place.name not in self._out:
            return
        array: object = self._out[place.name]
        if not isinstance(array, np.ndarray):
            raise InvalidArgumentError(f"out[{place.name!r}] is a {type(array).__name__}; it must be a NumPy array")
        if array.shape != shape:
            raise ShapeMismatchError(f"out[{place.name!r}] has shape {array.shape}; {what} shape {shape}")
        if array.dtype != place.dtype:
            raise DtypeMismatchError(f"out[{place.name!r}] has dtype {array.dtype}; the parameter has dtype {place.dtype}")
        if not array.flags.writeable:
            raise InvalidArgumentError(f"out[{place.name!r}] is read-only")

    def _by_array(self) -> dict[int, list[Place]]:
        found: dict[int, list[Place]] = {}
        for place in sorted(self.places, key=lambda place: place.index):
            found.setdefault(place.array_id, []).append(place)
        return found

    def _array_spans(self, array_id: int, places: list[Place]) -> list[_Span]:
        array = self.layout.arrays[array_id]
        if len(places) == self._counts[array_id]:
            flat = None
            if all(place.name not in self._arrays for place in places):
                flat = np.empty(array.length, array.dtype)
                for place in places:
                    self._arrays[place.name] = place.shaped(flat)
            else:
                flat = self._flat(places, array)
            if flat is not None:
                return [_Span(0, array.nbytes, flat.view(np.uint8))]
        return [self._span(place) for place in places if self._allocated(place).size]

    def _flat(self, places: list[Place], array: FlatArray) -> Array | None:
        """The flat array whose views `out` holds for all of these, if that is so."""
        first = self._arrays.get(places[0].name)
        flat = None if first is None else first.base
        if (
            not isinstance(flat, np.ndarray)
            or flat.shape != (array.length,)
            or flat.dtype != array.dtype
            or not flat.flags.c_contiguous
        ):
            return None
        origin = _address(flat)
        for place in places:
            view = self._arrays.get(place.name)
            at = origin + place.span[0]
            if view is None or view.base is not flat or not view.flags.c_contiguous or (view.size and _address(view) != at):
                return None
        return flat

    def _allocated(self, place: Place) -> Array:
        found = self._arrays.get(place.name)
        if found is None:
            found = self._arrays[place.name] = np.empty(place.shape, place.dtype)
        return found

    def _span(self, place: Place) -> _Span:
        array = self._arrays[place.name]
        if not array.flags.c_contiguous:
            self._late.append((array, array := np.empty(place.shape, place.dtype)))
        return _Span(*place.span, array.reshape(-1).view(np.uint8))


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def read(begin: data_pb2.WeightsBegin, receive: Callable[[], Item], destination: Destination) -> None:
    """Reads what follows a begin, up to the end. Nothing is written, nor `filled`, if the layout is another one.

    The error that comes among them is raised; ProtocolViolationError or InvalidChunkError if the server breaks the protocol.
    Then some arrays may have been written.
    """
    fits = begin.layout_version == destination.layout.version
    coverage = destination.coverage() if fits else {}
    receiver = destination.rows.receiver(begin.rows) if fits else None
    for item in from_inline(begin.inline) if begin.HasField("inline") else _followers(receive):
        if receiver is not None and item.array_id == ROWS_ARRAY_ID:
            receiver.add(item)
        elif fits:
            if item.array_id not in coverage:
                raise ProtocolViolationError(f"a chunk of array {item.array_id} came, which was not asked for")
            coverage[item.array_id].add(item.offset, item.data.nbytes)
            destination.write(item)
    missing = sum(len(entry.missing) for entry in coverage.values()) + (receiver.missing if receiver else 0)
    if missing:
        raise ProtocolViolationError(f"the weights ended with {missing} chunks missing")
    if fits:
        destination.rows.check()
    destination.filled = fits


def _followers(receive: Callable[[], Item]) -> Iterator[Chunk]:
    """The chunks that follow, up to the end."""
    while not isinstance(item := receive(), Message):
        yield item
    refused = refusal(item)
    if refused is not None:
        raise refused
    content = item.WhichOneof("content")
    if content != "end":
        raise ProtocolViolationError(f"{content} came among the weights")
