"""Arrays into grid blocks: each block as pieces borrowed from the caller's arrays, zeros between and for what is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from optserve.client._transport import Pieces
from optserve.wire.chunks import CHUNK_BYTES, block_count
from optserve.wire.layout import Layout, Place

Array = npt.NDArray[np.generic]

_ZEROS = memoryview(bytes(CHUNK_BYTES))


def raw_bytes(array: Array) -> memoryview:
    """The array's bytes in C order, one-dimensional; a copy only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array_blocks(
    array_id: int, nbytes: int, blocks: Iterable[int], places: list[Place], value: Callable[[Place], Array | None]
) -> Iterator[Pieces]:
    spans = [(*place.span, place) for place in places]
    first = 0
    borrowed: tuple[Place, memoryview] | None = (
        None  # a copy of an array that is not contiguous is made once, and kept no longer
    )
    for block in blocks:
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
            array = value(place)
            if array is None:
                pieces.append(_ZEROS[: stop - start])
            else:
                if borrowed is None or borrowed[0] is not place:
                    borrowed = (place, raw_bytes(array))
                pieces.append(borrowed[1][start - begin : stop - begin])
            at = stop
        if at < high:
            pieces.append(_ZEROS[: high - at])
        yield Pieces(array_id, low, tuple(pieces))


def blocks(
    layout: Layout, values: Mapping[str, Array | None], wanted: Mapping[int, Iterable[int]] | None = None
) -> Iterator[Pieces]:
    """The blocks of every array, or only the wanted ones (ascending), in order. A name without a value counts as zeros."""
    places: dict[int, list[Place]] = {}
    for place in layout.places:
        if place.size:
            places.setdefault(place.array_id, []).append(place)
    for array in layout.arrays:
        chosen = range(block_count(array.nbytes)) if wanted is None else wanted.get(array.array_id, ())
        yield from _array_blocks(
            array.array_id, array.nbytes, chosen, places.get(array.array_id, []), lambda place: values.get(place.name)
        )
