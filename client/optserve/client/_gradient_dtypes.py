"""In which dtype a gradient travels.

A gradient may have any floating dtype, complex for a complex parameter. The gradients that share a flat array travel in one:
their own if it is the same for all, else the narrowest that holds them exactly; but none wider than that of the optimizer's
state, to which wider ones are rounded.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from optserve.wire import dtypes
from optserve.wire.errors import DtypeMismatchError
from optserve.wire.layout import Place

_FLOAT32 = np.dtype(np.float32)


def reals_of(place: Place, dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype of a gradient's reals. DtypeMismatchError if the parameter takes no gradient of that dtype."""
    if dtype not in dtypes.DTYPES.values() or dtypes.is_complex(dtype) != place.is_complex:
        allowed = [held.name for held in dtypes.DTYPES.values() if dtypes.is_complex(held) == place.is_complex]
        raise DtypeMismatchError(
            f"gradient {place.name!r} has dtype {dtype}; the parameter has dtype {place.dtype} and takes {', '.join(allowed)}",
            parameter=place.name,
        )
    return dtypes.storage_dtype(dtype)


def common(found: Collection[np.dtype[np.generic]], state: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The dtype in which gradients of these real dtypes travel together; `state` is that of the optimizer's state."""
    distinct = set(found)
    widest = max(distinct, key=lambda dtype: dtype.itemsize)
    if widest.itemsize > state.itemsize:
        return state
    return _FLOAT32 if widest.itemsize == 2 and len(distinct) > 1 else widest


def complex_of(real: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The complex dtype of pairs of float32 or float64."""
    return np.dtype(np.complex64) if real == _FLOAT32 else np.dtype(np.complex128)
