"""A running sum outside of the store, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.wire.dtypes import DTYPES, is_complex
from optserve.wire.errors import InputError, InvalidStateDictError
from optserve.wire.layout import Layout, Place
from optserve.wire.rows import Rows, checked_ids

SUM, IDS, ROWS = "sum", "ids", "rows"
"""What a window's entries are called before the parameter's name."""

FlatArray = npt.NDArray[Any]


def checked(window: Mapping[str, FlatArray], rounds: int, layout: Layout) -> dict[int, FlatArray | Rows]:
    """By the parameter's index: its sum in its shape, or its rows, each in the parameter's. InvalidStateDictError."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise InvalidStateDictError(f"the running sum is of {rounds!r} rounds; it must be an integer, 0 or more")
    if window and not rounds:
        raise InvalidStateDictError(f"a running sum of no rounds has {', '.join(sorted(window))}")
    found: dict[int, FlatArray | Rows] = {}
    for key, array in window.items():
        kind, _, name = key.partition("/")
        place = layout.by_name.get(name)
        if place is None or kind not in (SUM, IDS, ROWS):
            raise InvalidStateDictError(
                f"the running sum has {key!r}; allowed are {SUM}, {IDS} and {ROWS}, each with a '/' and the name of a parameter"
            )
        if kind == SUM:
            if f"{IDS}/{name}" in window or f"{ROWS}/{name}" in window:
                raise InvalidStateDictError(f"the running sum of {name!r} is both whole and in rows")
            _check(array, place.shape, place, key)
            found[place.index] = array
        elif kind == IDS:
            found[place.index] = _rows(window, place)
        elif f"{IDS}/{name}" not in window:
            raise InvalidStateDictError(f"the running sum has {key!r} but no '{IDS}/{name}'")
    return found


def _rows(window: Mapping[str, FlatArray], place: Place) -> Rows:
    key = f"{ROWS}/{place.name}"
    if key not in window:
        raise InvalidStateDictError(f"the running sum has '{IDS}/{place.name}' but no {key!r}")
    ids, values = window[f"{IDS}/{place.name}"], window[key]
    if not place.shape or ids.dtype != np.int64 or ids.ndim != 1 or bool((ids[1:] <= ids[:-1]).any()):
        raise InvalidStateDictError(
            f"'{IDS}/{place.name}' of the running sum has dtype {ids.dtype} and shape {ids.shape}; it must be ascending "
            "numbers of rows, int64"
        )
    try:
        checked_ids(place, ids)
    except InputError as error:
        raise InvalidStateDictError(f"the running sum: {error}") from error
    _check(values, (len(ids), *place.shape[1:]), place, key)
    return Rows(ids, values)


def _check(array: FlatArray, shape: tuple[int, ...], place: Place, key: str) -> None:
    if array.shape != shape:
        raise InvalidStateDictError(f"{key!r} of the running sum has shape {array.shape}; it must have {shape}")
    if array.dtype not in DTYPES.values() or is_complex(array.dtype) != place.is_complex:
        wanted = "complex" if place.is_complex else "real floating-point"
        raise InvalidStateDictError(f"{key!r} of the running sum has dtype {array.dtype}; it must be {wanted} numbers")
    if not np.isfinite(array).all():  # no round would ever end the window
        raise InvalidStateDictError(f"{key!r} of the running sum holds NaN or Inf")


def shaped_rows(values: FlatArray, place: Place) -> FlatArray:
    """Rows of reals in the parameter's shape, complex where it is."""
    own = values.view(place.dtype) if place.is_complex else values
    return own.reshape(len(values), *place.shape[1:])
