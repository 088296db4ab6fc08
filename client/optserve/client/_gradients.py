"""Gradients: checked before the first byte is sent, then packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from optserve.client import _gradient_dtypes, _packing, _sparse
from optserve.client._digests import digest
from optserve.client._options import PushOptions
from optserve.client._packing import Blocks, Dtypes
from optserve.client._sparse import SparseGradient
from optserve.client._transport import Outgoing, Pieces
from optserve.v1 import data_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes, rows
from optserve.wire.chunks import INLINE_BYTES, to_inline
from optserve.wire.errors import DtypeMismatchError, InvalidArgumentError, ShapeMismatchError
from optserve.wire.layout import Layout, Place
from optserve.wire.rows import Rows

Array = npt.NDArray[np.generic]
Gradients = Mapping[str, npt.ArrayLike | SparseGradient | None]

_DEFAULT = PushOptions()


@dataclass(frozen=True)
class Push:
    """What one push contributes. Its arrays are the caller's own and must stay as they are until the answer."""

    layout: Layout
    contribution: data_pb2.Contribution
    options: PushOptions
    fingerprint: int
    values: Mapping[str, Array] = field(default_factory=dict)
    sparse: Mapping[str, Rows] = field(default_factory=dict)
    dtypes: Dtypes = field(default_factory=dict)
    """Of the chunks of the arrays that travel in another dtype than their own."""
    nonfinite: tuple[int, ...] = ()
    """Indices of the parameters whose gradients hold NaN or Inf."""

    @property
    def absent(self) -> list[int]:
        present = self.values.keys() | self.sparse.keys()
        return [place.index for place in self.layout.places if place.name not in present]

    def head(self) -> data_pb2.PushBegin:
        """The begin, but for what is the exchange's: identity, edits of groups, and which weights are wanted."""
        options, sends = self.options, self.contribution == data_pb2.CONTRIBUTION_GRADIENT
        return data_pb2.PushBegin(
            contribution=self.contribution,
            weight=options.weight,
            parameter_count=len(self.layout.places),
            absent=self.absent,
            content_fingerprint=self.fingerprint,
            metrics=options.metrics,
            nonfinite=self.nonfinite,
            layout_version=self.layout.version,
            dtypes={array_id: dtypes.to_wire(dtype) for array_id, dtype in self.dtypes.items()} if sends else {},
            sparse=self._entries() if sends else [],
            loss_scale=options.loss_scale,
            clip_grad_norm=options.clip_grad_norm,
            clip_grad_value=options.clip_grad_value,
            loss=options.loss,
            evaluation=options.evaluation,
            closure=options.closure,
        )

    def requests(self, begin: data_pb2.PushBegin) -> Iterator[Outgoing]:
        """Begin, chunks, end; made while they are sent. What is small travels inside the begin."""
        if self.nbytes <= INLINE_BYTES:
            begin.inline.CopyFrom(to_inline(pieces.assembled() for pieces in self.chunks()))
            yield data_pb2.StreamRequest(push=begin)
            return
        yield data_pb2.StreamRequest(push=begin)
        yield from self.chunks()
        yield data_pb2.StreamRequest(end=pb.StreamEnd())

    @property
    def nbytes(self) -> int:
        """Of all chunks."""
        spans = rows.table(self.layout, self._entries())
        return _packing.total_bytes(self.layout, self._blocks, self.dtypes) + (spans[-1].end if spans else 0)

    def chunks(self) -> Iterator[Pieces]:
        """The blocks that hold anything of a dense gradient, then the sparse ones; none unless it is a gradient."""
        if self.contribution == data_pb2.CONTRIBUTION_GRADIENT:
            yield from _packing.blocks(self.layout, self.values, self._blocks, self.dtypes)
            for chunk in rows.chunks(list(self.sparse.values())):
                yield Pieces(chunk.array_id, chunk.offset, (chunk.data,))

    @cached_property
    def _blocks(self) -> Blocks:
        return self.layout.blocks_of([place.index for place in self.layout.places if place.name in self.values], self.dtypes)

    def _entries(self) -> list[pb.RowsEntry]:
        return [_sparse.entry(self.layout.by_name[name], part) for name, part in self.sparse.items()]


def checked(layout: Layout, gradients: Gradients | None, options: PushOptions = _DEFAULT) -> Push:
    """A push of gradients; names that are missing or None are absent.

    UnknownParameterError, ShapeMismatchError, DtypeMismatchError, or InvalidArgumentError for a row. A gradient with NaN or Inf
    becomes the verdict instead of the bytes: the server answers by the job's policy. With found_inf the caller says so itself,
    and the gradients are not looked at.
    """
    if options.found_inf:
        return _push(layout, data_pb2.CONTRIBUTION_NONFINITE, options)
    if not isinstance(gradients, Mapping):
        raise InvalidArgumentError(f"gradients must be a dict of names to arrays; got {type(gradients).__name__}")
    values: dict[str, Array] = {}
    sparse: dict[str, Rows] = {}
    for name, gradient in gradients.items():
        place = layout.place(name, "gradient")
        if isinstance(gradient, SparseGradient):
            sparse[name] = _sparse.checked(place, gradient)
        elif gradient is not None:
            values[name] = _dense(place, gradient)
    travels = _travelling(layout, values)
    with np.errstate(all="ignore"):  # once: for each of many small arrays it would cost more than its digest
        digests = {name: digest(array, travels[layout.by_name[name].array_id]) for name, array in values.items()}
        digests |= {name: _rows_digest(part) for name, part in sparse.items()}
    nonfinite = tuple(layout.by_name[name].index for name, found in digests.items() if found is None)
    contribution = data_pb2.CONTRIBUTION_NONFINITE if nonfinite else data_pb2.CONTRIBUTION_GRADIENT
    own = {array_id: dtype for array_id, dtype in travels.items() if dtype != layout.arrays[array_id].dtype}
    push = _push(layout, contribution, options, digests, own)
    return replace(push, values=values, sparse=sparse, dtypes=own, nonfinite=nonfinite)


def skipped(layout: Layout, options: PushOptions = _DEFAULT) -> Push:
    """A push that contributes nothing: of the options it says the metrics."""
    return _push(layout, data_pb2.CONTRIBUTION_SKIP, PushOptions(0.0, options.metrics))


def abandoned(layout: Layout, options: PushOptions) -> Push:
    """A push that says that the closure failed at an evaluation."""
    left = PushOptions(closure=options.closure, evaluation=options.evaluation)
    return _push(layout, data_pb2.CONTRIBUTION_ABANDON, left)


def _dense(place: Place, gradient: npt.ArrayLike) -> Array:
    if getattr(gradient, "is_sparse", False):  # torch's error would say to_dense(), of a table that may be large
        raise DtypeMismatchError(
            f"gradient {place.name!r} is a sparse tensor; push SparseGradient(grad._indices()[0], grad._values())",
            parameter=place.name,
        )
    array = _sparse.array_of(gradient, f"gradient {place.name!r}", place.name)
    if array.shape != place.shape:
        raise ShapeMismatchError(
            f"gradient {place.name!r} has shape {array.shape}; the parameter has shape {place.shape}", parameter=place.name
        )
    if array.dtype != place.dtype:
        _gradient_dtypes.reals_of(place, array.dtype)
    return array


def _travelling(layout: Layout, values: Mapping[str, Array]) -> dict[int, np.dtype[np.generic]]:
    """The real dtype in which the dense gradients of each array travel."""
    found: dict[int, set[np.dtype[np.generic]]] = {}
    for name, array in values.items():
        if array.size:
            found.setdefault(layout.by_name[name].array_id, set()).add(array.dtype)
    own = {array.array_id: array.dtype for array in layout.arrays}
    return own | {
        array_id: _gradient_dtypes.common({dtypes.storage_dtype(dtype) for dtype in given}, dtypes.state_dtype(own[array_id]))
        for array_id, given in found.items()
    }


def _rows_digest(part: Rows) -> bytes | None:
    values = digest(part.values, part.values.dtype)
    return None if values is None else hashlib.blake2b(part.ids.tobytes(), digest_size=8).digest() + values


def _push(
    layout: Layout,
    contribution: data_pb2.Contribution,
    options: PushOptions,
    digests: Mapping[str, bytes | None] | None = None,
    sent: Dtypes | None = None,
) -> Push:
    said = replace(options, metrics=None, closure=0, evaluation=0)
    content = hashlib.blake2b(repr((contribution, said, sent)).encode(), digest_size=8)
    for name, found in (digests or {}).items():
        content.update(name.encode() + b"\0")
        content.update(found or b"")
    return Push(layout, contribution, options, int.from_bytes(content.digest(), "little"))
