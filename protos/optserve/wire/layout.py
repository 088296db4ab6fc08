"""Where each parameter lies: one flat array for each (group, real dtype), each at a multiple of 32 elements, zeros between.

A complex parameter lies in the array of its real dtype, as pairs of reals. While groups are only added, a layout stays a
valid part of every later one; where a parameter is renamed, replaced or removed, a new `base_version` begins.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from optserve.v1 import types_pb2 as pb
from optserve.wire import dtypes
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.errors import (
    DuplicateParameterError,
    InvalidArgumentError,
    ProtocolViolationError,
    StaleLayoutError,
    UnknownParameterError,
)

ALIGNMENT = 32
"""Elements: 64 bytes in the 16-bit types."""

FlatArray = npt.NDArray[np.generic]

_NONE = np.array([], np.intp)

_OWN: Mapping[int, np.dtype[np.generic]] = {}
"""Every array's grid counts its own bytes."""


@dataclass(frozen=True)
class Place:
    """One parameter. `index` is torch's integer id; `offset` and `size` count elements of its array, 2 for a complex one."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    array_id: int
    offset: int

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape) * (2 if self.is_complex else 1)

    @cached_property
    def is_complex(self) -> bool:
        return dtypes.is_complex(self.dtype)

    @cached_property
    def span(self) -> tuple[int, int]:
        """(begin, end) in the bytes of its array."""
        width = dtypes.storage_dtype(self.dtype).itemsize
        return self.offset * width, (self.offset + self.size) * width

    def shaped(self, flat: FlatArray) -> FlatArray:
        """The parameter in its shape, complex if it is, as a view of its flat array, or of one in the state dtype."""
        own = flat[self.offset : self.offset + self.size]
        return (own.view(self.dtype) if self.is_complex else own).reshape(self.shape)


@dataclass(frozen=True)
class Array:
    """One flat array. `dtype` is real; `length` is in elements, padding included."""

    array_id: int
    group: int
    dtype: np.dtype[np.generic]
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize

    @cached_property
    def state_dtype(self) -> np.dtype[np.generic]:
        return dtypes.state_dtype(self.dtype)

    @cached_property
    def unit(self) -> int:
        """Elements that gradients are folded by: a block of the grid in the state dtype, whatever the gradients' own is."""
        return CHUNK_BYTES // self.state_dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The parameters of a job in the order of torch's ids, and the flat arrays that hold them."""

    version: int = 0
    places: tuple[Place, ...] = ()
    arrays: tuple[Array, ...] = ()
    base_version: int = 0
    """The oldest version that is a valid part of this one."""

    @cached_property
    def nbytes(self) -> int:
        """Of all flat arrays in the wire dtypes."""
        return sum(array.nbytes for array in self.arrays)

    @cached_property
    def by_name(self) -> dict[str, Place]:
        return {place.name: place for place in self.places}

    @cached_property
    def names_by_group(self) -> dict[int, list[str]]:
        """The parameters of each group in order."""
        found: dict[int, list[str]] = {array.group: [] for array in self.arrays}
        for place in self.places:
            found[self.arrays[place.array_id].group].append(place.name)
        return found

    def place(self, name: str, what: str = "parameter") -> Place:
        """The place of a name. UnknownParameterError says `what` was named so."""
        try:
            return self.by_name[name]
        except KeyError:
            known = ", ".join(repr(entry) for entry in list(self.by_name)[:8])
            more = f" and {len(self.places) - 8} more" if len(self.places) > 8 else ""
            raise UnknownParameterError(f"{what} {name!r} is not in the job; its parameters are {known}{more}") from None

    def extended(self, group: int, parameters: Sequence[tuple[str, tuple[int, ...], np.dtype[np.generic]]]) -> Layout:
        """This layout with one more group. InvalidArgumentError or DuplicateParameterError if it cannot be."""
        if not parameters:
            raise InvalidArgumentError(f"param group {group} has no parameters")
        taken = set(self.by_name)
        lengths: dict[np.dtype[np.generic], int] = {}
        ids: dict[np.dtype[np.generic], int] = {}
        places = list(self.places)
        for name, shape, dtype in parameters:
            if not name:
                raise InvalidArgumentError(f"a parameter of group {group} has an empty name")
            dtypes.checked_bytes(f"parameter {name!r}", shape, dtype)
            if name in taken:
                raise DuplicateParameterError(f"parameter {name!r} appears more than once", parameter=name)
            taken.add(name)
            storage = dtypes.storage_dtype(dtype)
            array_id = ids.setdefault(storage, len(self.arrays) + len(ids))
            place = Place(len(places), name, shape, dtype, array_id, lengths.get(storage, 0))
            lengths[storage] = place.offset + -(-place.size // ALIGNMENT) * ALIGNMENT
            places.append(place)
        arrays = (*self.arrays, *(Array(ids[dtype], group, dtype, lengths[dtype]) for dtype in ids))
        return Layout(self.version + 1, tuple(places), arrays, self.base_version)

    def views(self, arrays: Mapping[int, FlatArray], names: Iterable[str] | None = None) -> dict[str, FlatArray]:
        """Each parameter as a view of its flat array, in its shape and dtype."""
        chosen = self.places if names is None else [self.place(name) for name in names]
        return {place.name: place.shaped(arrays[place.array_id]) for place in chosen}

    def check_version(self, version: int, what: str) -> None:
        """StaleLayoutError if `what` is of a layout that is no part of this one; 0 is this one."""
        if version and not self.base_version <= version <= self.version:
            raise StaleLayoutError(
                f"{what} is of layout {version}; the job has layout {self.version}, and none before {self.base_version} is "
                "part of it: a parameter was renamed, replaced or removed since",
                layout_version=version,
            )

    def blocks_of(self, indices: Collection[int], grids: Mapping[int, np.dtype[np.generic]] = _OWN) -> Mapping[int, list[int]]:
        """The grid blocks of each array that hold anything of the parameters with these (distinct) indices, in order.

        `grids`: the dtype whose bytes an array's grid counts, where that is not the array's own.
        """
        if len(indices) < len(self.places):
            return self._blocks(indices, grids)
        if not grids:
            return self._all_blocks
        blocks = {array_id: self._all_of(array_id, dtype.itemsize) for array_id, dtype in grids.items()}
        return {array_id: blocks.get(array_id, own) for array_id, own in self._all_blocks.items()}

    def units_of(self, indices: Collection[int]) -> Mapping[int, list[int]]:
        """As `blocks_of`, the units by which gradients are folded."""
        return self.blocks_of(indices, self._state_grids)

    @cached_property
    def _state_grids(self) -> Mapping[int, np.dtype[np.generic]]:
        return {array.array_id: array.state_dtype for array in self.arrays if array.state_dtype != array.dtype}

    def arrays_of(self, indices: Collection[int]) -> frozenset[int]:
        """The arrays in which these (distinct) parameters lie, even those without elements."""
        if len(indices) == len(self.places):
            return self._all_arrays
        return frozenset(self.places[index].array_id for index in indices)

    @cached_property
    def _all_arrays(self) -> frozenset[int]:
        return frozenset(place.array_id for place in self.places)

    @cached_property
    def _all_blocks(self) -> Mapping[int, list[int]]:
        return self._blocks(range(len(self.places)), _OWN)

    def _all_of(self, array_id: int, itemsize: int) -> list[int]:
        """The blocks of one array in a grid of that element size, for all of its parameters; kept."""
        found = self._grids.get((array_id, itemsize))
        if found is None:
            own = [place.index for place in self.places if place.array_id == array_id]
            dtype = np.dtype(f"u{itemsize}")
            found = self._grids[array_id, itemsize] = self._blocks(own, {array_id: dtype}).get(array_id, [])
        return found

    @cached_property
    def _grids(self) -> dict[tuple[int, int], list[int]]:
        return {}

    def _blocks(self, indices: Collection[int], grids: Mapping[int, np.dtype[np.generic]]) -> dict[int, list[int]]:
        touched: dict[int, set[int]] = {}
        for index in indices:
            place = self.places[index]
            if place.size:
                begin, end = place.span
                if place.array_id in grids:
                    width = grids[place.array_id].itemsize
                    begin, end = place.offset * width, (place.offset + place.size) * width
                first, last = begin // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
                touched.setdefault(place.array_id, set()).update(range(first, last + 1))
        return {array_id: sorted(found) for array_id, found in sorted(touched.items())}

    def padding(self, array_id: int, unit: int) -> npt.NDArray[np.intp]:
        """The elements of a unit, counted from its begin, that belong to no parameter: zero in weights and gradients."""
        return self._padding.get((array_id, unit), _NONE)

    @cached_property
    def _padding(self) -> Mapping[tuple[int, int], npt.NDArray[np.intp]]:
        found: dict[tuple[int, int], list[int]] = {}
        for place in self.places:
            per_unit = self.arrays[place.array_id].unit
            end = place.offset + place.size
            for element in range(end, -(-end // ALIGNMENT) * ALIGNMENT):
                unit, rest = divmod(element, per_unit)
                found.setdefault((place.array_id, unit), []).append(rest)
        return {key: np.array(elements, np.intp) for key, elements in found.items()}

    def to_proto(self) -> pb.Layout:
        """As it travels, each array placed on the server that answers."""
        return pb.Layout(
            layout_version=self.version,
            base_version=self.base_version,
            parameters=[
                pb.Parameter(name=p.name, shape=p.shape, dtype=dtypes.to_wire(p.dtype), array_id=p.array_id, offset=p.offset)
                for p in self.places
            ],
            arrays=[
                pb.FlatArray(array_id=a.array_id, group=a.group, dtype=dtypes.to_wire(a.dtype), length=a.length)
                for a in self.arrays
            ],
            placements=[pb.Placement(array_id=a.array_id, begin=0, end=a.length) for a in self.arrays],
        )

    @classmethod
    def from_proto(cls, layout: pb.Layout) -> Layout:
        """A received layout.

        ProtocolViolationError for a placement on another server, which this version does not know, or a complex array.
        """
        for placement in layout.placements:
            if placement.endpoint:
                raise ProtocolViolationError(
                    f"array {placement.array_id} is on {placement.endpoint}; this client knows jobs on one server only"
                )
        arrays = tuple(Array(a.array_id, a.group, dtypes.from_wire(a.dtype), a.length) for a in layout.arrays)
        for array in arrays:
            if dtypes.is_complex(array.dtype):
                raise ProtocolViolationError(f"array {array.array_id} has dtype {array.dtype}; a flat array holds reals")
        return cls(
            layout.layout_version,
            tuple(
                Place(index, p.name, tuple(p.shape), dtypes.from_wire(p.dtype, p.name), p.array_id, p.offset)
                for index, p in enumerate(layout.parameters)
            ),
            arrays,
            layout.base_version,
        )
