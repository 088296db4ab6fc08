"""Other parameters in a store: one renamed, replaced or removed. All that is not edited stays as it is, bit for bit.

A layout after an edit is the one that a job would have that had these parameters from the start. Flat arrays in which nothing
moves stay where they are; the others are made anew beside the old ones and filled before anything of the store changes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Optimizer
from optserve.server.store.column import Column
from optserve.server.store.slots import made
from optserve.wire.errors import InvalidArgumentError
from optserve.wire.layout import Layout, Place

FlatArray = npt.NDArray[Any]
Content = TypeVar("Content")
Entry = tuple[str, tuple[int, ...], np.dtype[Any]]


def renamed(layout: Layout, name: str, new_name: str) -> Layout:
    """The layout in which a parameter has another name, which must be free. UnknownParameterError."""
    index = layout.place(name).index
    places = tuple(replace(place, name=new_name) if place.index == index else place for place in layout.places)
    return _after(layout, Layout(places=places, arrays=layout.arrays))


def replaced(layout: Layout, name: str, value: FlatArray) -> Layout:
    """The layout in which a parameter has this value's shape and dtype. UnknownParameterError."""
    layout.place(name)
    return _relaid(layout, {name: (name, value.shape, value.dtype)})


def removed(layout: Layout, name: str) -> Layout:
    """The layout without a parameter. UnknownParameterError; InvalidArgumentError if it is the last one of its group."""
    group = layout.arrays[layout.place(name).array_id].group
    if len(layout.names_by_group[group]) == 1:
        raise InvalidArgumentError(
            f"parameter {name!r} is the only one of group {group}, and a group keeps at least one", parameter=name
        )
    return _relaid(layout, {name: None})


def _relaid(layout: Layout, edits: dict[str, Entry | None]) -> Layout:
    groups: dict[int, list[Entry]] = {group: [] for group in sorted(layout.names_by_group)}
    for place in layout.places:
        entry = edits.get(place.name, (place.name, place.shape, place.dtype))
        if entry is not None:
            groups[layout.arrays[place.array_id].group].append(entry)
    found = Layout()
    for group, parameters in groups.items():
        found = found.extended(group, parameters)
    return _after(layout, found)


def _after(layout: Layout, found: Layout) -> Layout:
    """No earlier layout is a part of the one that is found."""
    version = layout.version + 1
    return Layout(version, found.places, found.arrays, version)


@dataclass(frozen=True)
class Reshaped:
    """A store's columns as they will be, made for a store of this version. The ids are those of `layout`."""

    version: int
    layout: Layout
    columns: list[Column]
    fresh: dict[int, Column]
    """Those that were made, by id."""
    kept: dict[int, int]
    """For each that stays: the id that it had."""
    accumulators: dict[int, FlatArray] = field(default_factory=dict)
    """For the fresh ones, where a device was found to have all that they need."""

    def carried_over(self, by_id: Mapping[int, Content]) -> dict[int, Content]:
        """What belongs to arrays that stay, by the ids that they get."""
        return {new: by_id[old] for new, old in self.kept.items() if old in by_id}


def relabel(columns: Sequence[Column], layout: Layout) -> None:
    """Tells columns what their parameters are called by now, which are the same in the same order."""
    places = _by_array(layout)
    for array_id, column in enumerate(columns):
        column.relabel(layout.arrays[array_id], places[array_id])


def reshaped(
    now: Layout,
    wanted: Layout,
    version: int,
    columns: Sequence[Column],
    anew: Container[str],
    made_by: tuple[Optimizer, Backend],
) -> Reshaped:
    """Columns for the wanted layout, filled from those of now, which are only read. OutOfMemoryError.

    Of parameters that are `anew` nothing is taken into an array that is made: they are zeros, without state.
    """
    places, before = _by_array(wanted), _by_array(now)
    stay = {_content(now, array_id, entries): columns[array_id] for array_id, entries in before.items()}
    sources = {
        place.name: (columns[array_id], position)
        for array_id, entries in before.items()
        for position, place in enumerate(entries)
        if place.name not in anew
    }
    found = Reshaped(version, wanted, [], {}, {})
    for array in wanted.arrays:
        column = stay.get(_content(wanted, array.array_id, places[array.array_id]))
        if column is None:
            column = found.fresh[array.array_id] = Column(array, places[array.array_id], *made_by)
            _fill(column, sources, made_by[1])
        else:
            found.kept[array.array_id] = column.array.array_id
        found.columns.append(column)
    return found


def _by_array(layout: Layout) -> dict[int, list[Place]]:
    found: dict[int, list[Place]] = {array.array_id: [] for array in layout.arrays}
    for place in layout.places:
        found[place.array_id].append(place)
    return found


def _content(layout: Layout, array_id: int, places: Sequence[Place]) -> tuple[object, ...]:
    """What an array consists of."""
    array = layout.arrays[array_id]
    return array.group, array.dtype, tuple((place.name, place.shape, place.dtype, place.offset) for place in places)


def _fill(new: Column, sources: dict[str, tuple[Column, int]], backend: Backend) -> None:
    found = {position: sources[place.name] for position, place in enumerate(new.places) if place.name in sources}
    shapes = {
        position: {slot: array.shape for slot, array in old.slots.of(at).items()} for position, (old, at) in found.items()
    }
    new.slots.add(made(new.slots.lacking_for(shapes), new.state_dtype, backend), {})
    for position, (old, at) in found.items():
        _copy(new, position, old, at, backend)
    new.is_sealed = True


def _copy(new: Column, position: int, old: Column, at: int, backend: Backend) -> None:
    """One parameter with all that belongs to it."""
    place, source = new.places[position], old.places[at]
    into, from_ = slice(place.offset, place.offset + place.size), slice(source.offset, source.offset + source.size)
    new.weights[into] = old.weights[from_]
    if new.masters is not new.weights:
        backend.write(new.masters[into], backend.to_host(old.masters[from_]))
    mine = new.slots.of(position)
    for slot, array in old.slots.of(at).items():
        backend.write(mine[slot], backend.to_host(array))
    new.steps[position], new.has_state[position] = old.steps[at], old.has_state[at]
    for key, values in old.carried.items():
        new.carried[key][position] = values[at]
