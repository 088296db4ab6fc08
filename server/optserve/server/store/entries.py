"""What a step is given, checked before anything changes: flat arrays of gradients, and rows of single parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Group, Optimizer
from optserve.server.store.column import Column, Run
from optserve.server.store.rows import RowEntry, check, densified
from optserve.server.store.steps import Entry
from optserve.wire.errors import InvalidArgumentError, UnsupportedGradientError
from optserve.wire.layout import Layout
from optserve.wire.rows import Rows

FlatArray = npt.NDArray[Any]


def moving(
    optimizer: Optimizer, layout: Layout, groups: Sequence[Group], absent: frozenset[int], sparse: Mapping[int, Rows]
) -> frozenset[int]:
    """The parameters with sparse gradients of which all rows move. UnsupportedGradientError, with torch's message, if the
    optimizer takes no sparse gradient with these hyperparameters, or no dense one."""
    if optimizer.no_dense:
        dense = next((p for p in layout.places if p.index not in sparse and p.index not in absent), None)
        if dense is not None:
            raise UnsupportedGradientError(optimizer.no_dense, parameter=dense.name)
    found: set[int] = set()
    for index in sorted(sparse):
        place = layout.places[index]
        try:
            if optimizer.moves_all(groups[layout.arrays[place.array_id].group]):
                found.add(index)
        except RuntimeError as error:
            raise UnsupportedGradientError(str(error), parameter=place.name) from error
    return frozenset(found)


def flat_entries(
    columns: Sequence[Column], groups: Sequence[Group], gradients: Mapping[int, FlatArray], absent: frozenset[int]
) -> list[Entry]:
    """Of the parameters that are not absent. InvalidArgumentError."""
    entries: list[Entry] = []
    for column in columns:
        runs = column.runs(absent)
        if not runs:
            continue
        found = column.checked(gradients.get(column.array.array_id))
        entries.append(Entry(column, groups[column.array.group], found, runs))
    return entries


def row_entries(
    layout: Layout, columns: Sequence[Column], groups: Sequence[Group], sparse: Mapping[int, Rows]
) -> list[RowEntry]:
    """In the order of their indices. InvalidArgumentError."""
    entries: list[RowEntry] = []
    for index in sorted(sparse):
        if not 0 <= index < len(layout.places):
            raise InvalidArgumentError(f"rows of parameter {index} came; the job has {len(layout.places)}")
        column = columns[layout.places[index].array_id]
        entries.append(RowEntry(column, column.position_of(index), groups[column.array.group], sparse[index]))
        check(entries[-1])
    return entries


def as_flat(entry: RowEntry, backend: Backend) -> Entry:
    """The same step of all of a parameter's rows. OutOfMemoryError."""
    begin, end = entry.column.bounds(entry.position)
    run = Run(entry.position, entry.position + 1, begin, end)
    return Entry(entry.column, entry.group, densified(entry, backend), [run], begin)
