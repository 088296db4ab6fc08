"""The tensors of optimizer state of one flat array's parameters: state memory, made when hyperparameters first need it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Elementwise, Group, Optimizer
from optserve.wire.errors import OutOfMemoryError
from optserve.wire.layout import Array, Place

FlatArray = npt.NDArray[Any]

Key = TypeVar("Key", str, tuple[int, str])
Shape = tuple[int, ...]


class Slots(ABC, Generic[Key]):
    """Arrays by key. Not thread safe."""

    def __init__(self, optimizer: Optimizer, places: Sequence[Place], backend: Backend) -> None:
        self._optimizer, self._places, self._backend = optimizer, places, backend
        self._arrays: dict[Key, FlatArray] = {}

    def __getitem__(self, key: Key) -> FlatArray:
        return self._arrays[key]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def relabel(self, places: Sequence[Place]) -> None:
        """The same parameters under other names or indices."""
        self._places = places

    @abstractmethod
    def lacking(self, group: Group) -> dict[Key, Shape]:
        """What these hyperparameters need beside what is there, or in another shape."""

    @abstractmethod
    def lacking_for(self, shapes: Mapping[int, Mapping[str, Shape]]) -> dict[Key, Shape]:
        """The same for slots of given shapes, by position of the parameter."""

    @abstractmethod
    def of(self, position: int) -> dict[str, FlatArray]:
        """One parameter's slots that are there, in torch's order, as reals."""

    @abstractmethod
    def fill(self, first: int, last: int, initial: Mapping[str, float]) -> None:
        """Sets the slots of parameters first to last - 1 that are named, and perhaps the padding after these parameters."""

    @abstractmethod
    def add(self, made: Mapping[Key, FlatArray], initial: Mapping[str, float]) -> None:
        """Takes over new zeros, and sets those that begin with something else."""

    def zero(self) -> None:
        """All of them."""
        for array in self._arrays.values():
            self._backend.write(array, 0.0)

    def clear(self, padding: npt.NDArray[np.intp]) -> None:
        """Zeroes the padding of flat arrays, which lies at these elements."""


class FlatSlots(Slots[str]):
    """Elementwise optimizers': one flat array for each slot, laid out as the weights are. The key is the slot's name."""

    def __init__(self, optimizer: Elementwise, array: Array, places: Sequence[Place], backend: Backend) -> None:
        super().__init__(optimizer, places, backend)
        self._elementwise, self._length = optimizer, array.length

    def lacking(self, group: Group) -> dict[str, Shape]:
        return {slot: (self._length,) for slot in self._elementwise.slots(group) if slot not in self._arrays}

    def lacking_for(self, shapes: Mapping[int, Mapping[str, Shape]]) -> dict[str, Shape]:
        wanted = {slot for found in shapes.values() for slot in found}
        return {slot: (self._length,) for slot in self._optimizer.slot_keys if slot in wanted - self._arrays.keys()}

    def of(self, position: int) -> dict[str, FlatArray]:
        place = self._places[position]
        where = slice(place.offset, place.offset + place.size)
        shape = real_shape(place)
        return {slot: self._arrays[slot][where].reshape(shape) for slot in self._optimizer.slot_keys if slot in self._arrays}

    def fill(self, first: int, last: int, initial: Mapping[str, float]) -> None:
        end = self._places[last].offset if last < len(self._places) else self._length
        where = slice(self._places[first].offset, end)
        for slot, value in initial.items():
            if slot in self._arrays:
                self._backend.write(self._arrays[slot][where], value)

    def add(self, made: Mapping[str, FlatArray], initial: Mapping[str, float]) -> None:
        self._arrays.update(made)
        self.fill(0, len(self._places), {slot: value for slot, value in initial.items() if slot in made})

    def clear(self, padding: npt.NDArray[np.intp]) -> None:
        for array in self._arrays.values():
            self._backend.clear(array, padding)


class ShapedSlots(Slots[tuple[int, str]]):
    """Tensorwise optimizers': for each parameter and slot an array of its own shape. The key is (position, slot)."""

    def lacking(self, group: Group) -> dict[tuple[int, str], Shape]:
        return self.lacking_for(
            {position: slot_shapes(self._optimizer, group, place) for position, place in enumerate(self._places)}
        )

    def lacking_for(self, shapes: Mapping[int, Mapping[str, Shape]]) -> dict[tuple[int, str], Shape]:
        wanted = {(position, slot): shape for position, found in shapes.items() for slot, shape in found.items()}
        return {key: shape for key, shape in wanted.items() if key not in self._arrays or self._arrays[key].shape != shape}

    def of(self, position: int) -> dict[str, FlatArray]:
        keys = {slot: (position, slot) for slot in self._optimizer.slot_keys}
        return {slot: self._arrays[key] for slot, key in keys.items() if key in self._arrays}

    def fill(self, first: int, last: int, initial: Mapping[str, float]) -> None:
        for position in range(first, last):
            for slot, value in initial.items():
                if (position, slot) in self._arrays:
                    self._backend.write(self._arrays[position, slot], value)

    def add(self, made: Mapping[tuple[int, str], FlatArray], initial: Mapping[str, float]) -> None:
        self._arrays.update(made)
        for position, slot in made:
            self.fill(position, position + 1, {slot: initial[slot]} if slot in initial else {})


def made(shapes: Mapping[Key, Shape], dtype: npt.DTypeLike, backend: Backend) -> dict[Key, FlatArray]:
    """Zeros of these shapes in state memory. OutOfMemoryError."""
    return {
        key: allocated(backend.zeros, prod(shape), dtype, "optimizer state").reshape(shape) for key, shape in shapes.items()
    }


def allocated(make: Callable[[int, Any], FlatArray], length: int, dtype: npt.DTypeLike, what: str) -> FlatArray:
    """`make(length, dtype)`. OutOfMemoryError says `what` there was no memory for, unless the backend's own says it better."""
    try:
        return make(length, dtype)
    except OutOfMemoryError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(f"no memory for {what}: {length * np.dtype(dtype).itemsize} bytes") from error


def real_shape(place: Place) -> Shape:
    """The shape in which an optimizer sees a parameter: complex numbers are pairs of reals, along a last axis."""
    return (*place.shape, 2) if place.is_complex else place.shape


def slot_shapes(optimizer: Optimizer, group: Group, place: Place) -> dict[str, Shape]:
    """What these hyperparameters need of a parameter's slots, as reals."""
    return optimizer.state_shapes(group, real_shape(place))
