"""Weights on their way out: of one version or of a point of a search, whole, or of some parameters only some rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.host import JobHost
from optserve.server.store import Store
from optserve.v1 import data_pb2, types_pb2
from optserve.wire import errors, rows
from optserve.wire.chunks import CHUNK_BYTES, INLINE_BYTES, Chunk, array_chunks, to_inline
from optserve.wire.dtypes import to_wire
from optserve.wire.layout import Layout

Arrays = Mapping[int, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Selection:
    """Which weights are asked for. `rows`: ascending row numbers by parameter index, of that layout; `names`: which of the
    other parameters, all if it is empty. Of the flat arrays come the blocks that hold anything of those."""

    rows: Mapping[int, npt.NDArray[np.int64]]
    layout_version: int
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, layout: Layout, asked: Iterable[types_pb2.Rows], layout_version: int, names: Sequence[str] = ()) -> Selection:
        """StaleLayoutError, UnknownParameterError, ShapeMismatchError, InvalidArgumentError."""
        asked = list(asked)
        if asked:
            layout.check_version(layout_version, "the pull of rows")
        for name in names:
            layout.place(name)
        return cls(rows.from_deltas(layout, asked), layout.version, frozenset(names))

    @property
    def is_whole(self) -> bool:
        return not (self.rows or self.names)

    def check(self, layout: Layout) -> None:
        """StaleLayoutError if the rows are of parameters that are others by now."""
        if self.rows:
            layout.check_version(self.layout_version, "the pull of rows")

    def blocks(self, layout: Layout) -> Mapping[int, Sequence[int] | None]:
        """Blocks by array; None: all."""
        if self.is_whole:
            return dict.fromkeys(array.array_id for array in layout.arrays)
        chosen = {layout.place(name).index for name in self.names} if self.names else range(len(layout.places))
        return layout.blocks_of([index for index in chosen if index not in self.rows])

    def entries(self, layout: Layout) -> list[types_pb2.RowsEntry]:
        """What the bundle of rows holds."""
        return [
            types_pb2.RowsEntry(parameter=index, count=ids.size, dtype=to_wire(layout.places[index].dtype))
            for index, ids in self.rows.items()
        ]

    def fits(self, layout: Layout, limit: int) -> bool:
        """Whether all that is asked for has at most so many bytes, and may come in one message."""
        total = layout.nbytes
        if not self.is_whole:
            ends = [
                (layout.arrays[array_id].nbytes, block)
                for array_id, found in self.blocks(layout).items()
                for block in found or ()
            ]
            spans = rows.table(layout, self.entries(layout))
            total = sum(min(CHUNK_BYTES, end - block * CHUNK_BYTES) for end, block in ends) + (spans[-1].end if spans else 0)
        return total <= min(limit, INLINE_BYTES)


def begin(host: JobHost, selection: Selection) -> data_pb2.WeightsBegin:
    """Of the weights as they are. With the job's lock held. StaleLayoutError."""
    layout = host.job.store.layout
    selection.check(layout)
    return data_pb2.WeightsBegin(
        position=host.job.position.to_proto(), layout_version=layout.version, rows=selection.entries(layout)
    )


def in_place(arrays: Arrays, blocks: Mapping[int, Sequence[int] | None]) -> Iterator[Chunk]:
    """Chunks of flat arrays, which must stay as they are until all of them are taken."""
    for array_id, wanted in blocks.items():
        yield from array_chunks(array_id, arrays[array_id].view(np.uint8).data, wanted)


def copied(store: Store, selection: Selection) -> Iterator[Chunk]:
    """All that is asked for, copied now. With the job's lock held. OutOfMemoryError.

    Where rows are asked for nothing else is copied than them and the blocks beside them.
    """
    found = bundle(store, selection)
    blocks = selection.blocks(store.layout)
    if not selection.rows:
        return in_place(store.snapshot(), blocks)
    try:
        with store.reading("a pull") as arrays:
            copies = [chunk._replace(data=memoryview(bytes(chunk.data))) for chunk in in_place(arrays, blocks)]
    except MemoryError as error:
        raise errors.OutOfMemoryError("no memory for a copy of the weights that were asked for") from error
    return chain(copies, found)


def bundle(store: Store, selection: Selection) -> Iterator[Chunk]:
    """The rows that are asked for, copied now. With the job's lock held. OutOfMemoryError."""
    return rows.chunks([rows.Rows(ids, store.rows(index, ids)) for index, ids in selection.rows.items()])


def evaluate(host: JobHost, trial: Trial, inline_bytes: int) -> Iterator[data_pb2.StreamResponse | Chunk]:
    """Asks for the next evaluation, at the trial's weights."""
    with host.changed:
        layout = host.job.store.layout
        found = data_pb2.WeightsBegin(position=host.job.position.to_proto(), layout_version=layout.version)
    chunks = in_place(trial.arrays, dict.fromkeys(trial.arrays))
    is_small = sum(array.nbytes for array in trial.arrays.values()) <= min(inline_bytes, INLINE_BYTES)
    if is_small:
        found.inline.CopyFrom(to_inline(chunks))
    yield data_pb2.StreamResponse(evaluate=data_pb2.Evaluate(evaluation=trial.evaluation, weights=found))
    if not is_small:
        yield from chunks
        yield data_pb2.StreamResponse(end=types_pb2.StreamEnd())
