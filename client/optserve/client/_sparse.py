"""Gradients of which only some rows are not zero, and the numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optserve.client import _gradient_dtypes
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes, rows
from optserve.wire.errors import DtypeMismatchError, InvalidArgumentError, ShapeMismatchError
from optserve.wire.layout import Place
from optserve.wire.rows import Rows

_MOST = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class SparseGradient:
    """A gradient that is zero outside some rows of its parameter, such as an embedding's: only these rows are sent.

    rows: 1-D integers, counted from 0, in any order; one that repeats counts as often as it comes, its values are summed.
    values: for each of them the gradient of that row, of shape (len(rows), *parameter.shape[1:]) and of any dtype that a
    gradient of the parameter may have. No rows at all is a gradient that is zero everywhere, which is not the same as none.

        worker.push({"emb": SparseGradient([3, 1, 3], np.ones((3, 16), np.float32))})

    A torch.sparse_coo_tensor `grad` of one sparse dimension is SparseGradient(grad._indices()[0], grad._values()), coalesced or
    not. Both are checked when they are pushed: ShapeMismatchError, DtypeMismatchError, InvalidArgumentError for a row that the
    parameter does not have; UnsupportedGradientError if the optimizer takes no sparse gradients.
    """

    rows: npt.ArrayLike
    values: npt.ArrayLike


def array_of(given: object, what: str, parameter: str) -> npt.NDArray[np.generic]:
    """What NumPy makes of it. InvalidArgumentError or DtypeMismatchError, which name `what` it is, if that is nothing."""
    try:
        return np.asarray(given)
    except TypeError as error:  # a torch tensor that is sparse, or of bfloat16
        raise DtypeMismatchError(f"{what} cannot be made an array: {error}", parameter=parameter) from error
    except (ValueError, RuntimeError) as error:  # lists of unequal lengths; a torch tensor that requires grad
        raise InvalidArgumentError(f"{what} cannot be made an array: {error}") from error


def row_ids(place: Place, given: npt.ArrayLike, what: str) -> npt.NDArray[np.int64]:
    """Numbers of rows as they were given. InvalidArgumentError, which names `what` they are, or ShapeMismatchError."""
    rows.row_count(place)
    found = array_of(given, what, place.name)
    if found.ndim != 1:
        raise InvalidArgumentError(f"{what} have shape {found.shape}; they must be one-dimensional")
    if found.dtype.kind not in "iu" and (found.size or isinstance(given, np.ndarray)):
        raise InvalidArgumentError(f"{what} have dtype {found.dtype}; they must be integers")
    if found.dtype == np.uint64:
        found = np.minimum(found, np.uint64(_MOST))
    ids = np.ascontiguousarray(found, np.int64)
    rows.checked_ids(place, ids)
    return ids


def checked(place: Place, gradient: SparseGradient) -> Rows:
    """The rows as they travel: ascending, none twice, in the values' own dtype, or the widest that may travel.

    Rows of one number are added in their own dtype as torch does, but 16-bit ones in float32, which then travels.
    """
    ids = row_ids(place, gradient.rows, f"the rows of gradient {place.name!r}")
    values = array_of(gradient.values, f"the values of gradient {place.name!r}", place.name)
    shape = (ids.size, *place.shape[1:])
    if values.shape != shape:
        raise ShapeMismatchError(
            f"gradient {place.name!r} has {ids.size} rows and values of shape {values.shape}; the parameter has shape "
            f"{place.shape}, so the values must have shape {shape}",
            parameter=place.name,
        )
    real = _gradient_dtypes.reals_of(place, values.dtype)
    reals = np.ascontiguousarray(values).reshape(-1).view(real).reshape(ids.size, rows.row_size(place))
    if real.itemsize == 2 and np.unique(ids).size < ids.size:
        reals = reals.astype(np.float32)
    merged = rows.summed(ids, reals)
    sent = _gradient_dtypes.common([merged.values.dtype], dtypes.state_dtype(dtypes.storage_dtype(place.dtype)))
    with np.errstate(all="ignore"):  # what overflows is found as Inf
        return Rows(merged.ids, merged.values.astype(sent, copy=False))


def entry(place: Place, part: Rows) -> pb.RowsEntry:
    """What announces the rows in the bundle."""
    real = part.values.dtype
    dtype = _gradient_dtypes.complex_of(real) if place.is_complex else real
    return pb.RowsEntry(parameter=place.index, count=part.ids.size, dtype=dtypes.to_wire(dtype))
