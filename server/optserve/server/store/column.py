"""One flat array of a job with all that belongs to it: masters, optimizer state, and how often each parameter was stepped."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Elementwise, Optimizer
from optserve.server.store.slots import FlatSlots, ShapedSlots, Slots, allocated, real_shape
from optserve.server.store.state import MASTER, StoreState
from optserve.wire.dtypes import state_dtype, storage_dtype
from optserve.wire.errors import InvalidArgumentError, OutOfMemoryError
from optserve.wire.layout import ALIGNMENT, Array, Place

FlatArray = npt.NDArray[Any]


class Run(NamedTuple):
    """Neighbouring parameters (positions first to last - 1) that are stepped together, and their elements."""

    first: int
    last: int
    begin: int
    end: int


class Column:
    """Not thread safe: the store's lock guards it.

    `weights` are host memory, what transports read and write. `masters` are state memory: the same array where the backend
    works on the host and the weights have 32 bits or more. `narrow` is what elementwise kernels narrow the masters of 16-bit
    weights into: the weights, or their twin in state memory, of which only what was just stepped is valid.
    """

    def __init__(self, array: Array, places: Sequence[Place], optimizer: Optimizer, backend: Backend) -> None:
        """`places` are the array's parameters in order. OutOfMemoryError if there is no room."""
        self.array = array
        self.places = tuple(places)
        self.state_dtype = state_dtype(array.dtype)
        self._backend = backend
        self._what = f"a flat array of {array.length} elements ({len(self.places)} parameters)"
        self.weights = allocated(backend.host_zeros, array.length, array.dtype, self._what)
        self.is_narrow = array.dtype.itemsize == 2
        self.masters = self.weights if backend.on_host and not self.is_narrow else self.accumulator()
        self.narrow: FlatArray | None = None
        if self.is_narrow and isinstance(optimizer, Elementwise):
            self.narrow = self.weights if backend.on_host else allocated(backend.zeros, array.length, array.dtype, self._what)
        self.readable = self.weights.view()
        self.readable.flags.writeable = False
        self.slots: Slots[Any] = (
            FlatSlots(optimizer, array, self.places, backend)
            if isinstance(optimizer, Elementwise)
            else ShapedSlots(optimizer, self.places, backend)
        )
        self.steps = np.zeros(len(self.places), np.int64)
        self.has_state = np.zeros(len(self.places), np.bool_)
        self.carried = {key: np.zeros(len(self.places), np.float32) for key in optimizer.scalar_keys}
        self.is_sealed = False
        self._runs: tuple[frozenset[int], list[Run]] | None = None
        ends = [-(-(place.offset + place.size) // ALIGNMENT) * ALIGNMENT for place in self.places]
        self._bounds = [(place.offset, end) for place, end in zip(self.places, ends, strict=True)]
        gaps = [np.arange(p.offset + p.size, end) for p, end in zip(self.places, ends, strict=True)]
        self._padding = np.concatenate(gaps).astype(np.intp)

    @property
    def nbytes(self) -> int:
        arrays = {id(array): array for array in (self.weights, self.masters, self.narrow) if array is not None}
        scalars = sum(values.nbytes for values in self.carried.values())
        return sum(array.nbytes for array in arrays.values()) + self.slots.nbytes + scalars

    def accumulator(self) -> FlatArray:
        """State memory: zeros of the state dtype, as long as the array."""
        return allocated(self._backend.zeros, self.array.length, self.state_dtype, self._what)

    def takes(self, gradient: FlatArray) -> bool:
        """Whether a gradient has this array's length, and its state or wire dtype."""
        return gradient.shape == self.weights.shape and gradient.dtype in (self.state_dtype, self.array.dtype)

    def checked(self, gradient: FlatArray | None) -> FlatArray:
        """InvalidArgumentError unless there is one that it takes."""
        if gradient is None or not self.takes(gradient):
            raise InvalidArgumentError(
                f"array {self.array.array_id} needs a gradient of {self.array.length} elements of dtype "
                f"{self.state_dtype} or {self.array.dtype}"
            )
        return gradient

    # Values

    def seal(self) -> None:
        """The weights are complete: makes the masters of them."""
        self.weights[self._padding] = 0
        self._widen(slice(None))
        self.is_sealed = True

    def set_value(self, place: Place, value: FlatArray) -> None:
        """A whole parameter, and its masters."""
        where = slice(place.offset, place.offset + place.size)
        self.weights[where] = reals(value)
        self._widen(where)

    def forget(self, place: Place) -> None:
        """A parameter's state, which begins again at step 0."""
        position = self.places.index(place)
        for array in self.slots.of(position).values():
            self._backend.write(array, 0.0)
        self.steps[position], self.has_state[position] = 0, False
        self._carry(position, position + 1, dict.fromkeys(self.carried, 0.0))
        self._runs = None

    def relabel(self, array: Array, places: Sequence[Place]) -> None:
        """The same parameters under other names, indices or another id."""
        self.array, self.places = array, tuple(places)
        self.slots.relabel(self.places)
        self._runs = None

    def _widen(self, where: slice) -> None:
        if self.masters is not self.weights:
            self._backend.write(self.masters[where], self.weights[where])

    # Steps

    def position_of(self, index: int) -> int:
        """Of the parameter with this index, which is one of the array's."""
        return next(position for position, place in enumerate(self.places) if place.index == index)

    def bounds(self, position: int) -> tuple[int, int]:
        """The elements of a parameter and of the padding after it."""
        return self._bounds[position]

    def spans(self, indices: Container[int]) -> list[tuple[int, int]]:
        """The elements of those of its parameters that are among these, with the padding after each: neighbours as one."""
        found: list[tuple[int, int]] = []
        for place, (begin, end) in zip(self.places, self._bounds, strict=True):
            if place.index in indices:
                found[-1:] = [(found[-1][0], end)] if found and found[-1][1] == begin else [*found[-1:], (begin, end)]
        return found

    def runs(self, absent: frozenset[int]) -> list[Run]:
        """The parameters that are not absent, in runs of equal step and equal scalars, all with state or all without.

        Kept until other parameters are absent: what is equal in a run stays so, since it is stepped together.
        """
        if self._runs is not None and self._runs[0] == absent:
            return self._runs[1]
        alike = list(
            zip(self.steps.tolist(), self.has_state.tolist(), *(v.tolist() for v in self.carried.values()), strict=True)
        )
        found: list[Run] = []
        for position, place in enumerate(self.places):
            begin, end = self._bounds[position]
            if place.index in absent:
                continue
            previous = found[-1] if found else None
            if previous and previous.last == position and alike[previous.first] == alike[position]:
                found[-1] = Run(previous.first, position + 1, previous.begin, end)
            else:
                found.append(Run(position, position + 1, begin, end))
        self._runs = (absent, found)
        return found

    def begin(self, first: int, last: int, initial: Mapping[str, float]) -> None:
        """Before a step of parameters first to last - 1, which are alike: the first one's slots and scalars begin as given."""
        if not self.has_state[first]:
            self.slots.fill(first, last, initial)
            self._carry(first, last, {key: initial.get(key, 0.0) for key in self.carried})

    def scalars(self, position: int) -> dict[str, float]:
        """What a parameter carries from step to step."""
        return {key: float(values[position]) for key, values in self.carried.items()}

    def stepped(self, first: int, last: int, carried: Mapping[str, float]) -> None:
        """Counts one step of parameters first to last - 1, which carry these scalars now."""
        self.steps[first:last] += 1
        self.has_state[first:last] = True
        self._carry(first, last, carried)

    def _carry(self, first: int, last: int, carried: Mapping[str, float]) -> None:
        for key, value in carried.items():
            with np.errstate(over="ignore"):
                self.carried[key][first:last] = np.float32(value)

    def settle(self, runs: Sequence[Run]) -> None:
        """After a step: the padding is zero again whatever it made of it (0 / 0 where eps is 0), and the weights are new."""
        if self._padding.size:
            for values in (self.masters, *([] if self.narrow is None else [self.narrow])):
                self._backend.clear(values, self._padding)
            self.slots.clear(self._padding)
        source = self.masters if self.narrow is None else self.narrow
        if source is not self.weights:
            for run in runs:
                self._backend.publish(source[run.begin : run.end], self.weights[run.begin : run.end])

    def create_state(self, initial: Mapping[str, float]) -> None:
        """State at step 0 for the parameters that have none."""
        without = np.flatnonzero(~self.has_state)
        for neighbours in np.split(without, np.flatnonzero(np.diff(without) > 1) + 1):
            if neighbours.size:
                self.begin(int(neighbours[0]), int(neighbours[-1]) + 1, initial)
        self.steps[without], self.has_state[without] = 0, True
        self.slots.clear(self._padding)
        self._runs = None

    # State in and out

    def export(self, content: StoreState) -> None:
        """Adds copies to the content."""
        for position, place in enumerate(self.places):
            content.values[place.name] = copied(place.shaped(self.weights))
            if self.is_narrow:
                where = slice(place.offset, place.offset + place.size)
                content.state[f"{MASTER}/{place.name}"] = self.outward(place, self.masters[where].reshape(place.shape))
            if not self.has_state[position]:
                continue
            content.steps[place.name] = int(self.steps[position])
            for key, values in self.carried.items():
                content.state[f"{key}/{place.name}"] = np.array(values[position])
            for slot, array in self.slots.of(position).items():
                content.state[f"{slot}/{place.name}"] = self.outward(place, array)

    def outward(self, place: Place, array: FlatArray) -> FlatArray:
        """A copy; a slot as large as its complex parameter is complex too."""
        host = self._backend.to_host(array)
        host = copied(host) if self._backend.on_host else host
        if place.is_complex and array.shape == real_shape(place):
            return host.reshape(-1).view(place.dtype).reshape(place.shape)
        return host

    def load(
        self,
        content: StoreState,
        found: Mapping[int, Mapping[str, FlatArray]],
        with_values: bool,
        counts_steps: bool,
        loaded: Container[str] | None,
    ) -> None:
        """Takes over a content that was checked; `found` holds each parameter's state, for which there are arrays.

        Parameters that are not among the `loaded` keep theirs; None: all are.
        """
        if loaded is None:
            self.slots.zero()
        for position, place in enumerate(self.places):
            if loaded is not None:
                if place.name not in loaded:
                    continue
                self.forget(place)
            state = dict(found.get(place.index, {}))
            if with_values:
                self.set_value(place, content.values[place.name])
            master = state.pop(MASTER, None)
            if master is not None:
                self._adopt(place, master)
            self._carry(position, position + 1, {key: float(state.get(key, 0.0)) for key in self.carried})
            for slot, array in self.slots.of(position).items():
                if slot in state:
                    self._backend.write(array, reals(state[slot]).reshape(array.shape))
            least = 1 if state and not counts_steps else 0  # torch's SGD has a buffer, but no count
            self.steps[position] = max(content.steps.get(place.name, 0), least)
            self.has_state[position] = bool(state) or place.name in content.steps
        self.is_sealed = self.is_sealed or with_values
        self._runs = None

    def _adopt(self, place: Place, wanted: FlatArray) -> None:
        """Masters where they narrow to the weights, else the weights."""
        weights = self.weights[place.offset : place.offset + place.size]
        with np.errstate(all="ignore"):
            masters = wanted.reshape(-1).astype(self.state_dtype)
            fits = masters.astype(weights.dtype).view(np.uint16) == weights.view(np.uint16)
            masters = np.where(fits, masters, weights.astype(self.state_dtype))
        self._backend.write(self.masters[place.offset : place.offset + place.size], masters)


def reals(value: FlatArray) -> FlatArray:
    """Flat; complex numbers as pairs."""
    return np.ascontiguousarray(value).reshape(-1).view(storage_dtype(value.dtype))


def copied(array: FlatArray) -> FlatArray:
    """A copy. OutOfMemoryError."""
    try:
        return array.copy()
    except MemoryError as error:
        raise OutOfMemoryError(f"no memory for a copy of {array.nbytes} bytes of weights or state") from error
