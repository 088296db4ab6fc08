"""The store of one job: it owns the flat arrays and the lock that says who may read or change them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.backends.threads import core_count
from optserve.server.formulas import Elementwise, Optimizer, Tensorwise
from optserve.server.store.access import Access, Arrays, Hold
from optserve.server.store.column import Column, copied
from optserve.server.store.slots import made
from optserve.server.store.state import StoreState, check, shapes_of
from optserve.server.store.steps import ElementwiseSteps, Entry
from optserve.server.store.tensors import TensorwiseSteps
from optserve.wire.errors import (
    DtypeMismatchError,
    InvalidArgumentError,
    InvalidChunkError,
    ShapeMismatchError,
    UnknownParameterError,
)
from optserve.wire.layout import Layout
from optserve.wire.values import Value

FlatArray = npt.NDArray[Any]
Groups = Sequence[Mapping[str, Value]]

_WAIT_SECONDS = 60.0


class _Snapshot(dict[int, npt.NDArray[np.generic]]):
    """A dict that can be weakly referenced."""


class Store:
    """Parameters, masters, optimizer state and step counts of one job. Thread safe.

    Whatever waits takes `timeout_seconds` and raises DeadlineExceededError, which names who was waited for. `version` grows
    with every change.
    """

    def __init__(self, optimizer: Optimizer, backend: Backend, threads: int | None = None) -> None:
        """`threads`: how many take part in an update where the backend does not say; None: one a core. The bits do not
        depend on it."""
        self.optimizer = optimizer
        self.backend = backend
        self.layout = Layout()
        self.version = 0
        self._steps = _steps(optimizer, backend, backend.threads or threads or core_count())
        self._columns: list[Column] = []
        self._rehearsed: set[int] = set()
        """Ids of the arrays of whose steps a device is known to have all that they need."""
        self._access = Access()  # guards everything above
        self._reserved: dict[int, FlatArray] = {}  # accumulators by array, for who asks first; taken out at one go
        self._snapshot: weakref.ref[_Snapshot] | None = None
        self._snapshot_version = -1
        self._snapshot_lock = threading.Lock()  # guards the two above

    # Values

    def add_group(
        self,
        parameters: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]],
        timeout_seconds: float = _WAIT_SECONDS,
    ) -> None:
        """Adds zeros in place of the parameters, to be written block by block and sealed.

        Errors of Layout.extended; OutOfMemoryError. Then nothing is added.
        """
        with self._changing("adding a param group", timeout_seconds):
            group = 1 + max((array.group for array in self.layout.arrays), default=-1)
            layout = self.layout.extended(group, parameters)
            self._columns += [
                Column(array, [p for p in layout.places if p.array_id == array.array_id], self.optimizer, self.backend)
                for array in layout.arrays[len(self._columns) :]
            ]
            self.layout = layout

    def write_block(self, array_id: int, offset_bytes: int, data: memoryview, timeout_seconds: float = _WAIT_SECONDS) -> None:
        """Initial values of an array that is not sealed yet. InvalidChunkError if they do not lie in it."""
        column = self._column(array_id)
        with self._changing("writing initial values", timeout_seconds):
            if column.is_sealed:
                raise InvalidChunkError(f"array {array_id} has its initial values already")
            if offset_bytes < 0 or offset_bytes + data.nbytes > column.weights.nbytes:
                raise InvalidChunkError(
                    f"{data.nbytes} bytes at {offset_bytes} do not lie in array {array_id} of {column.weights.nbytes} bytes"
                )
            target = column.weights.view(np.uint8)[offset_bytes : offset_bytes + data.nbytes]
            target[:] = np.frombuffer(data, np.uint8)

    def seal(self, timeout_seconds: float = _WAIT_SECONDS) -> None:
        """The initial values of all arrays so far are complete."""
        with self._changing("sealing the initial values", timeout_seconds):
            for column in self._columns:
                if not column.is_sealed:
                    column.seal()

    def set_values(self, values: Mapping[str, FlatArray], timeout_seconds: float = _WAIT_SECONDS) -> None:
        """Whole parameters. UnknownParameterError, ShapeMismatchError or DtypeMismatchError changes nothing."""
        for name, value in values.items():
            place = self.layout.place(name)
            if value.shape != place.shape:
                raise ShapeMismatchError(f"value {name!r} has shape {value.shape}; the parameter has shape {place.shape}")
            if value.dtype != place.dtype:
                raise DtypeMismatchError(f"value {name!r} has dtype {value.dtype}; the parameter has dtype {place.dtype}")
        with self._changing("setting values", timeout_seconds):
            for name, value in values.items():
                place = self.layout.place(name)
                self._columns[place.array_id].set_value(place, value)

    # Steps

    def accumulators(self, held: Container[int] = ()) -> dict[int, FlatArray]:
        """Zeros for gradients, the caller's own: one array of the state dtype for each flat array whose id is not in `held`."""
        columns = {column.array.array_id: column for column in self._columns if column.array.array_id not in held}
        reserved = {array_id: self._reserved.pop(array_id, None) for array_id in columns}
        return {
            array_id: column.accumulator() if (found := reserved[array_id]) is None else found
            for array_id, column in columns.items()
        }

    def prepare(self, groups: Groups, timeout_seconds: float = _WAIT_SECONDS) -> None:
        """Compiles every kernel and allocates all state that these hyperparameters need; on a device the first `accumulators`
        too, and what steps compute besides. OutOfMemoryError."""
        self._check_groups(groups)
        for column in self._columns:
            self._steps.prepare(column, groups[column.array.group])
        if self.lacks_state(groups) or self._unrehearsed():
            with self._access.writing("allocating optimizer state", timeout_seconds):
                self._allocate(groups, rehearses=not self.backend.on_host)
        self.create_state(groups, timeout_seconds)

    def _unrehearsed(self) -> bool:
        return not self.backend.on_host and len(self._rehearsed) < len(self._columns)

    def lacks_state(self, groups: Groups) -> bool:
        """Whether these hyperparameters need state that is not there: then `prepare` waits for readers."""
        return any(column.slots.lacking(groups[column.array.group]) for column in self._columns)

    def create_state(self, groups: Groups, timeout_seconds: float = _WAIT_SECONDS) -> None:
        """State at step 0 for parameters that have none, if the optimizer has state before its first step. OutOfMemoryError."""
        if self.optimizer.stateful_from_creation and not all(column.has_state.all() for column in self._columns):
            with self._changing("creating optimizer state", timeout_seconds):
                self._check_groups(groups)
                self._allocate(groups)
                self._create_state(groups)

    def update(
        self,
        groups: Groups,
        gradients: Mapping[int, FlatArray],
        scale: float = 1.0,
        absent: frozenset[int] = frozenset(),
        timeout_seconds: float = _WAIT_SECONDS,
    ) -> None:
        """One step of every parameter whose index is not in `absent`; of those, weights, slots and step stay as they are.

        Gradients have the state or the wire dtype and are not changed; `scale` multiplies them first. An array of which all
        parameters are absent needs none. InvalidArgumentError if one is missing or of another length; then nothing changed.
        """
        with self._changing("the update", timeout_seconds):
            self._check_groups(groups)
            self._allocate(groups)
            self._create_state(groups)
            entries = self._entries(groups, gradients, absent)
            self._steps.step(entries, scale)
            for entry in entries:
                entry.column.settle(entry.runs)

    def _entries(self, groups: Groups, gradients: Mapping[int, FlatArray], absent: frozenset[int]) -> list[Entry]:
        entries: list[Entry] = []
        for column in self._columns:
            runs = column.runs(absent)
            if not runs:
                continue
            found = gradients.get(column.array.array_id)
            if found is None or not column.takes(found):
                raise InvalidArgumentError(
                    f"array {column.array.array_id} needs a gradient of {column.array.length} elements of dtype "
                    f"{column.state_dtype} or {column.array.dtype}"
                )
            entries.append(Entry(column, groups[column.array.group], found, runs))
        for entry in entries:
            entry.column.is_sealed = True
        return entries

    def _allocate(self, groups: Groups, rehearses: bool = False) -> None:
        """All that is lacking, or with OutOfMemoryError nothing; it also tries what steps need besides."""
        lacking = [(column, column.slots.lacking(groups[column.array.group])) for column in self._columns]
        arrays = [(column, made(shapes, column.state_dtype, self.backend)) for column, shapes in lacking if shapes]
        if rehearses:
            self._rehearse(groups, {column.array.array_id for column, _ in arrays})
        for column, found in arrays:
            column.slots.add(found, self.optimizer.initial(groups[column.array.group]))

    def _rehearse(self, groups: Groups, changed: Container[int]) -> None:
        """With all state allocated; of arrays that are new, or whose state changes."""
        columns = {column.array.array_id: column for column in self._columns}
        new = columns.keys() - self._rehearsed
        reserved = {array_id: columns[array_id].accumulator() for array_id in new}
        for array_id, column in columns.items():
            if array_id in new or array_id in changed:
                self._steps.rehearse(column, groups[column.array.group])
        self._reserved |= reserved
        self._rehearsed |= new

    def _create_state(self, groups: Groups) -> None:
        if self.optimizer.stateful_from_creation:
            for column in self._columns:
                if not column.has_state.all():
                    column.create_state(self.optimizer.initial(groups[column.array.group]))

    def _check_groups(self, groups: Groups) -> None:
        if len(groups) <= max((column.array.group for column in self._columns), default=-1):
            raise InvalidArgumentError(f"{len(groups)} param groups were given; the job has more")

    # Reading

    def hold(self, reader: str = "a reader", timeout_seconds: float = _WAIT_SECONDS) -> Hold:
        """The weights as they are, until `release`: nothing is changed meanwhile. `reader` is what errors call the holder."""
        self._access.begin_reading(reader, timeout_seconds)
        arrays: Arrays = {column.array.array_id: column.readable for column in self._columns}
        return Hold(arrays, self.version, lambda: self._access.end_reading(reader))

    @contextmanager
    def reading(self, reader: str = "a reader", timeout_seconds: float = _WAIT_SECONDS) -> Iterator[Arrays]:
        """`hold` as a context manager."""
        hold = self.hold(reader, timeout_seconds)
        try:
            yield hold.arrays
        finally:
            hold.release()

    def snapshot(self, timeout_seconds: float = _WAIT_SECONDS) -> Arrays:
        """An immutable copy of the weights of one version, the same object for all who ask while someone keeps it."""
        with self.reading("a snapshot", timeout_seconds) as arrays, self._snapshot_lock:
            found = self._snapshot() if self._snapshot is not None else None
            if found is None or self._snapshot_version != self.version:
                found = _Snapshot({array_id: copied(array) for array_id, array in arrays.items()})
                for array in found.values():
                    array.flags.writeable = False
                self._snapshot, self._snapshot_version = weakref.ref(found), self.version
            return found

    # State in and out

    def export(self, timeout_seconds: float = _WAIT_SECONDS) -> StoreState:
        """Copies of everything of one version. Masters of 16-bit parameters are always among the state."""
        content = StoreState({}, {}, {})
        with self.reading("an export", timeout_seconds):
            for column in self._columns:
                column.export(content)
        return content

    def check(self, content: StoreState, groups: Groups, with_values: bool) -> None:
        """InvalidStateDictError if `load` would refuse it."""
        self._check_groups(groups)
        check(content, self.layout, self.optimizer, groups, with_values)

    def load(self, content: StoreState, groups: Groups, with_values: bool, timeout_seconds: float = _WAIT_SECONDS) -> None:
        """Replaces all optimizer state, and the weights if `with_values`. A parameter without state begins again at step 0.

        `groups` are the hyperparameters that belong to the state. A master is taken where it narrows to the parameter's weight;
        elsewhere the weight was set by someone and wins. InvalidStateDictError if names or shapes do not fit, OutOfMemoryError;
        then nothing is changed.
        """
        self._check_groups(groups)
        found = check(content, self.layout, self.optimizer, groups, with_values)
        with self._changing("loading a state", timeout_seconds):
            if self.optimizer.stateful_from_creation:
                self._allocate(groups)
            shapes = [column.slots.lacking_for(shapes_of(found, column.places, self.optimizer)) for column in self._columns]
            arrays = [
                made(wanted, column.state_dtype, self.backend) for column, wanted in zip(self._columns, shapes, strict=True)
            ]
            for column, slots in zip(self._columns, arrays, strict=True):
                column.slots.add(slots, {})
                column.load(content, found, with_values, self.optimizer.counts_steps)
            self._create_state(groups)

    @property
    def state_bytes(self) -> int:
        """Weights, masters and optimizer state."""
        return sum(column.nbytes for column in self._columns)

    def _column(self, array_id: int) -> Column:
        if not 0 <= array_id < len(self._columns):
            raise UnknownParameterError(f"array {array_id} is not in the job; it has {len(self._columns)} arrays")
        return self._columns[array_id]

    @contextmanager
    def _changing(self, writer: str, timeout_seconds: float) -> Iterator[None]:
        with self._access.writing(writer, timeout_seconds):
            self.version += 1
            yield


def _steps(optimizer: Optimizer, backend: Backend, threads: int) -> ElementwiseSteps | TensorwiseSteps:
    match optimizer:
        case Elementwise():
            return ElementwiseSteps(optimizer, backend, threads)
        case Tensorwise():
            return TensorwiseSteps(optimizer, backend, threads)
        case _:
            raise TypeError(f"{optimizer.name} is neither elementwise nor tensorwise")
