"""One flat array of a job with all that belongs to it: masters, slots, and how often each parameter was stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.store.state import MASTER, StoreState
from optserve.wire.dtypes import state_dtype
from optserve.wire.errors import OutOfMemoryError
from optserve.wire.layout import ALIGNMENT, Array, Place

FlatArray = npt.NDArray[Any]


class Run(NamedTuple):
    """Neighbouring parameters (positions first to last - 1) that are stepped together, and their elements."""

    first: int
    last: int
    begin: int
    end: int


class Column:
    """Not thread safe: the store's lock guards it."""

    def __init__(self, array: Array, places: Sequence[Place], backend: Backend) -> None:
        """`places` are the array's parameters in order. OutOfMemoryError if there is no room."""
        self.array = array
        self.places = tuple(places)
        self.state_dtype = state_dtype(array.dtype)
        self._backend = backend
        self.weights = self._zeros(array.dtype)
        self.is_narrow = array.dtype.itemsize == 2
        self.masters = self._zeros(self.state_dtype) if self.is_narrow else self.weights
        self.readable = self.weights.view()
        self.readable.flags.writeable = False
        self.slots: dict[str, FlatArray] = {}
        self.steps = np.zeros(len(self.places), np.int64)
        self.has_state = np.zeros(len(self.places), np.bool_)
        self.is_sealed = False
        self._runs: tuple[frozenset[int], list[Run]] | None = None
        ends = [-(-(place.offset + place.size) // ALIGNMENT) * ALIGNMENT for place in self.places]
        self._bounds = [(place.offset, end) for place, end in zip(self.places, ends, strict=True)]
        gaps = [np.arange(p.offset + p.size, end) for p, end in zip(self.places, ends, strict=True)]
        self._padding = np.concatenate(gaps).astype(np.intp)

    def _zeros(self, dtype: npt.DTypeLike) -> FlatArray:
        try:
            return self._backend.zeros(self.array.length, dtype)
        except MemoryError as error:
            size = self.array.length * np.dtype(dtype).itemsize
            raise OutOfMemoryError(f"no memory for a flat array of {size} bytes ({len(self.places)} parameters)") from error

    def accumulator(self) -> FlatArray:
        """Zeros of the state dtype, as long as the array."""
        return self._zeros(self.state_dtype)

    def allocate(self, slots: Sequence[str]) -> None:
        """Adds the slots that are not there yet. OutOfMemoryError adds none."""
        missing = {slot: self._zeros(self.state_dtype) for slot in slots if slot not in self.slots}
        self.slots.update(missing)

    def takes(self, gradient: FlatArray) -> bool:
        """Whether a gradient has this array's length, and its state or wire dtype."""
        return gradient.shape == self.weights.shape and gradient.dtype in (self.state_dtype, self.array.dtype)

    def clear(self, values: FlatArray) -> None:
        """Zeroes the padding of an array of this layout."""
        if self._padding.size:
            values[self._padding] = 0

    def clear_padding(self) -> None:
        """Whatever a step made of the zeros between parameters (0 / 0 where eps is 0, a client's stray bytes) is zero again."""
        for values in (self.weights, *([self.masters] if self.is_narrow else []), *self.slots.values()):
            self.clear(values)

    def widen(self) -> None:
        """Masters from weights."""
        if self.is_narrow:
            self.masters[:] = self.weights

    def runs(self, absent: frozenset[int]) -> list[Run]:
        """The parameters that are not absent, in runs of equal step. Kept until other parameters are absent, since steps of a
        run grow together."""
        if self._runs is not None and self._runs[0] == absent:
            return self._runs[1]
        found: list[Run] = []
        for position, place in enumerate(self.places):
            begin, end = self._bounds[position]
            if place.index in absent:
                continue
            previous = found[-1] if found else None
            if previous and previous.last == position and self.steps[previous.first] == self.steps[position]:
                found[-1] = Run(previous.first, position + 1, previous.begin, end)
            else:
                found.append(Run(position, position + 1, begin, end))
        self._runs = (absent, found)
        return found

    def stepped(self, run: Run) -> None:
        """Counts one step of a run."""
        self.steps[run.first : run.last] += 1
        self.has_state[run.first : run.last] = True

    def export(self, content: StoreState) -> None:
        """Adds copies to the content."""
        content.values.update(self._copies("", self.weights, self.places))
        stated = [place for place, has in zip(self.places, self.has_state, strict=True) if has]
        for slot, flat in self.slots.items():
            content.state.update(self._copies(f"{slot}/", flat, stated))
        if self.is_narrow:
            content.state.update(self._copies(f"{MASTER}/", self.masters, self.places))
        for place, step, has in zip(self.places, self.steps.tolist(), self.has_state, strict=True):
            if has:
                content.steps[place.name] = step

    @staticmethod
    def _copies(prefix: str, flat: FlatArray, places: Sequence[Place]) -> dict[str, FlatArray]:
        return {f"{prefix}{p.name}": copied(flat[p.offset : p.offset + p.size]).reshape(p.shape) for p in places}

    def load(
        self, content: StoreState, found: Mapping[int, Mapping[str, FlatArray]], with_values: bool, counts_steps: bool
    ) -> None:
        """Takes over a content that was checked; `found` holds each parameter's slots, which are allocated."""
        for flat in self.slots.values():
            flat[:] = 0
        for position, place in enumerate(self.places):
            where = slice(place.offset, place.offset + place.size)
            state = dict(found.get(place.index, {}))
            master = state.pop(MASTER, None)
            if with_values:
                self.set_value(place, content.values[place.name])
            if master is not None:
                _adopt(self.masters[where], self.weights[where], master.reshape(-1))
            for slot, value in state.items():
                self.slots[slot][where] = value.reshape(-1)
            least = 1 if state and not counts_steps else 0  # torch's SGD has a buffer, but no count
            self.steps[position] = max(content.steps.get(place.name, 0), least)
            self.has_state[position] = bool(state) or place.name in content.steps
        self.is_sealed = self.is_sealed or with_values
        self._runs = None

    def set_value(self, place: Place, value: FlatArray) -> None:
        """A whole parameter, and its masters."""
        where = slice(place.offset, place.offset + place.size)
        self.weights[where] = value.reshape(-1)
        if self.is_narrow:
            self.masters[where] = self.weights[where]

    @property
    def nbytes(self) -> int:
        masters = self.masters.nbytes if self.is_narrow else 0
        return self.weights.nbytes + masters + sum(slot.nbytes for slot in self.slots.values())


def copied(array: FlatArray) -> FlatArray:
    """A copy. OutOfMemoryError."""
    try:
        return array.copy()
    except MemoryError as error:
        raise OutOfMemoryError(f"no memory for a copy of {array.nbytes} bytes of weights or state") from error


def _adopt(masters: FlatArray, weights: FlatArray, wanted: FlatArray) -> None:
    with np.errstate(all="ignore"):
        fits = wanted.astype(weights.dtype).view(np.uint16) == weights.view(np.uint16)
        np.copyto(masters, wanted.astype(masters.dtype), where=fits)
