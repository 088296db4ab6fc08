"""The state that belongs to no one parameter: that of an optimizer that searches, for all of them together.

Outside of the store it is named arrays: counts and numbers are 0-d float64, lists of numbers 1-d float64, vectors 1-d, and
histories have a row for each vector. A search's outcome has the same, but of histories only the new vectors, each by itself,
and how many of the former ones are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Optimizer, Searching
from optserve.wire.dtypes import DTYPES, is_complex, state_dtype
from optserve.wire.errors import InvalidStateDictError, OutOfMemoryError
from optserve.wire.layout import Layout

FlatArray = npt.NDArray[Any]
State = Mapping[str, Any]
"""By torch's names: int, float, vectors in state memory, and lists of floats or of vectors."""

X = "x"
"""In an outcome: the parameters as one vector."""

_KEPT = "kept"
"""In an outcome: how many vectors of each history."""


def vector_length(layout: Layout) -> int:
    """Reals in all parameters."""
    return sum(place.size for place in layout.places)


def vector_dtype(layout: Layout) -> np.dtype[Any]:
    """The widest of the state dtypes."""
    return np.result_type(np.float32, *(state_dtype(array.dtype) for array in layout.arrays))


class Extras:
    """Guarded by the store's lock. Vectors are never changed once they are here."""

    def __init__(self, optimizer: Optimizer, backend: Backend) -> None:
        self._optimizer, self._backend = optimizer, backend
        self.state: State = {}

    @property
    def nbytes(self) -> int:
        entries = [entry for value in self.state.values() for entry in (value if isinstance(value, list) else [value])]
        return sum(getattr(entry, "nbytes", 8) for entry in entries)

    def export(self) -> dict[str, FlatArray]:
        """Copies. OutOfMemoryError."""
        try:
            return {name: self._exported(name, value) for name, value in self.state.items()}
        except MemoryError as error:
            raise OutOfMemoryError(f"no memory for a copy of {self.nbytes} bytes of optimizer state") from error

    def _exported(self, name: str, value: Any) -> FlatArray:
        if not isinstance(self._optimizer, Searching) or name not in (*self._optimizer.vectors, *self._optimizer.histories):
            return np.array(value, np.float64)
        if name in self._optimizer.vectors:
            return np.array(self._backend.to_host(value))
        width = self.state[self._optimizer.vectors[0]]
        found = np.empty((len(value), width.size), width.dtype)
        for row, vector in zip(found, value, strict=True):
            row[:] = self._backend.to_host(vector)
        return found

    def loaded(self, content: Mapping[str, FlatArray], dtype: np.dtype[Any]) -> State:
        """What `check` has let pass as state; vectors come in that dtype. OutOfMemoryError."""
        state: dict[str, Any] = {}
        if isinstance(self._optimizer, Searching):
            for name, value in content.items():
                if name in self._optimizer.vectors:
                    state[name] = self._placed(value, dtype)
                elif name in self._optimizer.histories:
                    state[name] = [self._placed(row, dtype) for row in value]
                else:
                    state[name] = _plain(self._optimizer, name, value)
        return state

    def _placed(self, vector: FlatArray, dtype: np.dtype[Any]) -> FlatArray:
        """A copy in state memory."""
        placed = self._backend.zeros(vector.size, dtype)
        self._backend.write(placed, vector)
        return placed

    def adopt(self, outcome: Mapping[str, FlatArray]) -> None:
        """Takes over what a search that began with this state has come to, its arrays too."""
        if not isinstance(self._optimizer, Searching):
            raise TypeError(f"{self._optimizer.name} does not search")
        state: dict[str, Any] = {}
        for name in self._optimizer.state_keys:
            if name in self._optimizer.histories and _KEPT in outcome:
                former = self.state.get(name, [])
                count = sum(key.startswith(f"{name}/") for key in outcome)
                new = [self._backend.place(outcome[f"{name}/{index}"]) for index in range(count)]
                state[name] = [*former[len(former) - int(outcome[_KEPT]) :], *new]
            elif name in outcome and name in self._optimizer.vectors:
                state[name] = self._backend.place(outcome[name])
            elif name in outcome:
                state[name] = _plain(self._optimizer, name, outcome[name])
        self.state = state


def difference(optimizer: Searching, begun: State, state: State, backend: Backend) -> dict[str, FlatArray]:
    """What `Extras.adopt` makes the state of, where a search began with `begun`. In host memory, perhaps the state's own."""
    found: dict[str, FlatArray] = {}
    for name, value in state.items():
        if name in optimizer.histories:
            former = {id(vector) for vector in begun.get(name, [])}
            new = [vector for vector in value if id(vector) not in former]
            found[_KEPT] = np.array(len(value) - len(new))
            found |= {f"{name}/{index}": backend.to_host(vector) for index, vector in enumerate(new)}
        elif name in optimizer.vectors:
            found[name] = backend.to_host(value)
        else:
            found[name] = np.array(value, np.float64)
    return found


def _plain(optimizer: Searching, name: str, value: FlatArray) -> Any:
    """A count, a number or a list of numbers."""
    return int(value) if name in optimizer.counts else value.astype(np.float64).tolist()


def check(content: Mapping[str, FlatArray], optimizer: Optimizer, layout: Layout) -> None:
    """InvalidStateDictError if it is no state of all these parameters together."""
    if not content:
        return
    if not isinstance(optimizer, Searching):
        raise InvalidStateDictError(f"{optimizer.name} has no state beside the parameters'; {next(iter(content))!r} was found")
    for name, array in content.items():
        if name not in optimizer.state_keys:
            allowed = ", ".join(optimizer.state_keys)
            raise InvalidStateDictError(f"state {name!r} is not {optimizer.name}'s; allowed are {allowed}")
        _check_array(name, array, optimizer, vector_length(layout))
    _check_complete(content, optimizer)


def _check_array(name: str, array: FlatArray, optimizer: Searching, length: int) -> None:
    if array.dtype not in DTYPES.values() or is_complex(array.dtype):
        raise InvalidStateDictError(f"state {name!r} has dtype {array.dtype}; it must be real floating-point numbers")
    if name in optimizer.vectors and array.shape != (length,):
        raise InvalidStateDictError(f"state {name!r} has shape {array.shape}; the parameters have {length} elements")
    if name in optimizer.histories and (array.ndim != 2 or array.shape[1] != length):
        raise InvalidStateDictError(
            f"state {name!r} has shape {array.shape}; it must have rows as long as the parameters, {length} elements"
        )
    if name in (*optimizer.counts, *optimizer.numbers) and array.shape:
        raise InvalidStateDictError(f"state {name!r} has shape {array.shape}; it must be a single number")
    if name in (*optimizer.lists, *optimizer.scratch) and array.ndim != 1:
        raise InvalidStateDictError(f"state {name!r} has shape {array.shape}; it must be a list of numbers")
    if name in optimizer.counts and not (0 <= float(array) < 2**53 and float(array).is_integer()):
        raise InvalidStateDictError(f"state {name!r} is {float(array)}; it must be a whole number, 0 or more")


def _check_complete(content: Mapping[str, FlatArray], optimizer: Searching) -> None:
    """What is forgotten would silently begin anew."""
    needed = list(optimizer.counts)
    if len(content) > len(needed) or float(content.get(optimizer.moves, 0)):
        needed = [name for name in optimizer.state_keys if name not in optimizer.scratch]
    lacking = [name for name in needed if name not in content]
    if lacking:
        raise InvalidStateDictError(f"the state has {', '.join(content)} but no {', '.join(lacking)}")
    counts = {name: len(content[name]) for name in (*optimizer.histories, *optimizer.lists) if name in content}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise InvalidStateDictError(f"the state has {found}; these must be equally many")
