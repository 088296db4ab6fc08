"""torch's state of LBFGS: one for all parameters, kept under the first one, with lists of vectors and of numbers.

On the wire counts, numbers and lists of numbers are float64, a list of vectors is one array with a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.wire import dtypes
from optserve.wire.errors import InvalidStateDictError
from optserve.wire.layout import Layout

Array = npt.NDArray[np.generic]

_COUNTS = ("func_evals", "n_iter")
_FLOATS = ("t", "prev_loss")
_SCALARS = ("H_diag",)
_VECTORS = ("d", "prev_flat_grad")
_HISTORIES = ("old_dirs", "old_stps")
_LISTS = ("ro", "al")


def is_one(entry: Mapping[Any, Any]) -> bool:
    """Whether a parameter's state is that of LBFGS."""
    return _COUNTS[0] in entry


def outward(slots: Mapping[str, Array], group: Mapping[str, Any]) -> dict[str, Any]:
    """What was received, with torch's types; the arrays are views. `al` has room for the whole history, as in torch."""
    dtype = slots["d"].dtype if "d" in slots else np.dtype(np.float32)
    found: dict[str, Any] = dict(slots)
    for name, value in slots.items():
        if name in _COUNTS:
            found[name] = int(value)
        elif name in _FLOATS:
            found[name] = float(value)
        elif name in _HISTORIES:
            found[name] = list(value)
        elif name in (*_LISTS, *_SCALARS):
            numbers = value.astype(dtype)
            found[name] = [np.array(number) for number in numbers] if name in _LISTS else numbers
    if "al" in found:
        found["al"] += [None] * (group["history_size"] - len(found["al"]))
    return found


def inward(entry: Mapping[Any, Any], layout: Layout, to_array: Callable[[object, str], Array]) -> dict[str, Array]:
    """torch's state as it is sent; `to_array` makes an array of any array or tensor. InvalidStateDictError if it is none."""
    dtype = np.result_type(np.float32, *(dtypes.state_dtype(array.dtype) for array in layout.arrays))
    found: dict[str, Array] = {}
    for name, value in entry.items():
        what = f"{name} of LBFGS's state"
        if value is None:
            continue
        if name in _HISTORIES:
            found[name] = _stacked(_list(value, what), layout, dtype, what, to_array)
        elif name in _LISTS:
            numbers = [_number(number, what, to_array) for number in _list(value, what) if number is not None]
            found[name] = np.array(numbers, np.float64)
        elif name in _VECTORS:
            found[name] = _vector(value, dtype, what, to_array)
        elif name in (*_COUNTS, *_FLOATS, *_SCALARS):
            found[name] = np.array(_number(value, what, to_array), np.float64)
        else:
            allowed = ", ".join((*_COUNTS, *_VECTORS, *_HISTORIES, *_LISTS, *_FLOATS, *_SCALARS))
            raise InvalidStateDictError(f"state {name!r} is not LBFGS's; allowed are {allowed}")
    return found


def _list(value: object, what: str) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    raise InvalidStateDictError(f"{what} is a {type(value).__name__}; it must be a list")


def _number(value: object, what: str, to_array: Callable[[object, str], Array]) -> float:
    array = to_array(value, what)
    if array.size != 1 or array.dtype.kind == "c":
        raise InvalidStateDictError(f"{what} has shape {array.shape} and dtype {array.dtype}; it must be a real number")
    return float(array.reshape(()))


def _vector(value: object, dtype: np.dtype[Any], what: str, to_array: Callable[[object, str], Array]) -> Array:
    array = to_array(value, what)
    if array.dtype.kind == "c" or array.ndim != 1:
        raise InvalidStateDictError(f"{what} has shape {array.shape} and dtype {array.dtype}; it must be a vector of reals")
    with np.errstate(over="ignore"):  # beyond float32 is infinite there, as in torch
        return array.astype(dtype, copy=False)


def _stacked(
    values: list[Any], layout: Layout, dtype: np.dtype[Any], what: str, to_array: Callable[[object, str], Array]
) -> Array:
    length = sum(place.size for place in layout.places)
    found = np.empty((len(values), length), dtype)
    for index, value in enumerate(values):
        vector = _vector(value, dtype, f"{what}, entry {index},", to_array)
        if vector.size != length:
            raise InvalidStateDictError(
                f"{what}, entry {index}, has {vector.size} elements; the job's parameters have {length}"
            )
        found[index] = vector
    return found
