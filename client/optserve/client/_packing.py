"""Arrays into grid blocks: each block as pieces borrowed from the caller's arrays, zeros between and for what is absent.

An array's blocks may be of another dtype than the array: then the grid counts bytes in that, and what is of a third dtype is
converted block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from optserve.client._transport import Pieces
from optserve.wire import dtypes
from optserve.wire.chunks import CHUNK_BYTES, block_count
from optserve.wire.layout import Array as FlatArray
from optserve.wire.layout import Layout, Place

Array = npt.NDArray[np.generic]
Blocks = Mapping[int, Sequence[int]]
"""Ascending, by array."""

Dtypes = Mapping[int, np.dtype[np.generic]]
"""Of the blocks of arrays, where it is not the array's own."""

_ZEROS = memoryview(bytes(CHUNK_BYTES))


def reals(array: Array) -> Array:
    """The array's elements in C order, one-dimensional, complex ones as pairs; a copy only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(dtypes.storage_dtype(array.dtype))


def total_bytes(layout: Layout, wanted: Blocks, sent: Dtypes) -> int:
    """Of these blocks."""
    total = 0
    for array_id, found in wanted.items():
        nbytes = _nbytes(layout.arrays[array_id], sent)
        total += len(found) * CHUNK_BYTES
        if found and found[-1] == nbytes // CHUNK_BYTES:  # the last one is cut short
            total -= CHUNK_BYTES - nbytes % CHUNK_BYTES
    return total


def blocks(
    layout: Layout, values: Mapping[str, Array | None], wanted: Blocks | None = None, sent: Dtypes | None = None
) -> Iterator[Pieces]:
    """The blocks of every array, or only the wanted ones, in order. A name without a value counts as zeros."""
    places: dict[int, list[Place]] = {}
    for place in layout.places:
        if place.size:
            places.setdefault(place.array_id, []).append(place)
    for array in layout.arrays:
        dtype = _dtype(array, sent or {})
        nbytes = array.length * dtype.itemsize
        chosen = range(block_count(nbytes)) if wanted is None else wanted.get(array.array_id, ())
        yield from _array_blocks(array, dtype, chosen, places.get(array.array_id, []), lambda place: values.get(place.name))


def _dtype(array: FlatArray, sent: Dtypes) -> np.dtype[np.generic]:
    return sent.get(array.array_id, array.dtype)


def _nbytes(array: FlatArray, sent: Dtypes) -> int:
    return array.length * _dtype(array, sent).itemsize


def _array_blocks(
    array: FlatArray,
    dtype: np.dtype[np.generic],
    chosen: Iterable[int],
    places: list[Place],
    value: Callable[[Place], Array | None],
) -> Iterator[Pieces]:
    width = dtype.itemsize
    nbytes = array.length * width
    spans = [(place.offset * width, (place.offset + place.size) * width, place) for place in places]
    first = 0
    borrowed: tuple[Place, Array] | None = None  # a copy of an array that is not contiguous is made once, and kept no longer
    for block in chosen:
        low, high = block * CHUNK_BYTES, min((block + 1) * CHUNK_BYTES, nbytes)
        while first < len(spans) and spans[first][1] <= low:
            first += 1
        pieces: list[memoryview] = []
        at = low
        for begin, end, place in spans[first:]:
            if begin >= high:
                break
            start, stop = max(begin, low), min(end, high)
            if start > at:
                pieces.append(_ZEROS[: start - at])
            found = value(place)
            if found is None:
                pieces.append(_ZEROS[: stop - start])
            else:
                if borrowed is None or borrowed[0] is not place:
                    borrowed = (place, reals(found))
                pieces.append(_raw(borrowed[1], start - begin, stop - begin, dtype))
            at = stop
        if at < high:
            pieces.append(_ZEROS[: high - at])
        yield Pieces(array.array_id, low, tuple(pieces))


def _raw(flat: Array, start: int, stop: int, dtype: np.dtype[np.generic]) -> memoryview:
    """Bytes start..stop of the elements in that dtype; borrowed if it is their own."""
    own = flat[start // dtype.itemsize : stop // dtype.itemsize]
    if own.dtype != dtype:
        with np.errstate(all="ignore"):
            own = own.astype(dtype)
    raw: memoryview = own.view(np.uint8).data
    return raw
