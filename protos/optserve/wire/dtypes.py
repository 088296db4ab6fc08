"""The element types of parameters on the wire and in NumPy.

bfloat16 is `ml_dtypes.bfloat16` in NumPy. The 16-bit types have float32 masters and float32 optimizer state. Flat arrays hold
reals only: a complex parameter lies there as pairs of reals, as torch computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import DtypeMismatchError, InvalidArgumentError

DTYPES: dict[pb.DataType, np.dtype[np.generic]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype(np.float32),
    pb.DATA_TYPE_FLOAT64: np.dtype(np.float64),
    pb.DATA_TYPE_FLOAT16: np.dtype(np.float16),
    pb.DATA_TYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DATA_TYPE_COMPLEX64: np.dtype(np.complex64),
    pb.DATA_TYPE_COMPLEX128: np.dtype(np.complex128),
}
"""Wire to NumPy."""

_PARTS: dict[np.dtype[np.generic], np.dtype[np.generic]] = {
    np.dtype(np.complex64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.float64),
}
"""The real dtype of a complex one."""

_MAX_DIMENSIONS, _MAX_BYTES = 64, 1 << 62

_DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}


def to_wire(dtype: npt.DTypeLike, what: str = "array") -> pb.DataType:
    """The wire's name of a NumPy dtype. DtypeMismatchError names `what` if optserve does not hold that dtype."""
    found = np.dtype(dtype)
    try:
        return _DATA_TYPES[found]
    except KeyError:
        allowed = ", ".join(entry.name for entry in DTYPES.values())
        raise DtypeMismatchError(f"{what} has dtype {found}; allowed are {allowed}", found=found) from None


def from_wire(data_type: pb.DataType, what: str = "array") -> np.dtype[np.generic]:
    """The NumPy dtype of a wire name. DtypeMismatchError names `what` if the number is not known."""
    try:
        return DTYPES[data_type]
    except KeyError:
        raise DtypeMismatchError(f"{what} has the unknown data type {data_type}", found=data_type) from None


def checked_bytes(what: str, shape: Sequence[int], dtype: np.dtype[np.generic]) -> int:
    """The bytes of an array. InvalidArgumentError names `what` if NumPy could not hold one of that shape."""
    if any(extent < 0 for extent in shape) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidArgumentError(f"{what} has the shape {tuple(shape)}; extents are at least 0, dimensions at most 64")
    if math.prod(max(extent, 1) for extent in shape) * dtype.itemsize > _MAX_BYTES:
        raise InvalidArgumentError(f"{what} has the shape {tuple(shape)}, more than any memory holds")
    return math.prod(shape) * dtype.itemsize


def storage_dtype(dtype: npt.DTypeLike) -> np.dtype[np.generic]:
    """The dtype of the flat array that holds a parameter: its own, or that of a complex one's parts."""
    found = np.dtype(dtype)
    return _PARTS.get(found, found)


def is_complex(dtype: npt.DTypeLike) -> bool:
    """Whether a parameter of that dtype lies as pairs of reals."""
    return np.dtype(dtype) in _PARTS


def state_dtype(dtype: npt.DTypeLike) -> np.dtype[np.generic]:
    """The dtype of masters, accumulators and optimizer state of a parameter or flat array: its own, but float32 for 16 bits."""
    found = np.dtype(dtype)
    return np.dtype(np.float32) if found.itemsize == 2 else found
