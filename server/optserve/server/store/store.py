"""The store of one job: its weights with all that belongs to them, stepped, summed up, taken out and put back."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.backends.threads import core_count
from optserve.server.formulas import Optimizer, Searching
from optserve.server.store import reshaping
from optserve.server.store.column import copied
from optserve.server.store.entries import as_flat, flat_entries, moving, row_entries
from optserve.server.store.extras import Extras, X, vector_dtype, vector_length
from optserve.server.store.kinds import steps_of
from optserve.server.store.search import Search
from optserve.server.store.slots import made
from optserve.server.store.state import StoreState, check, shapes_of
from optserve.server.store.sums import checked
from optserve.server.store.vector import Vector
from optserve.server.store.weights import WAIT_SECONDS, Weights
from optserve.server.store.window import Window
from optserve.wire.layout import Layout
from optserve.wire.rows import Rows, Sums
from optserve.wire.values import Value

FlatArray = npt.NDArray[Any]
Groups = Sequence[Mapping[str, Value]]

_NO_ROWS: Mapping[int, Rows] = {}


class Store(Weights):
    """Parameters, masters, optimizer state and step counts of one job. Thread safe.

    Whatever waits takes `timeout_seconds` and raises DeadlineExceededError, which names who was waited for. `version` grows
    with every change.
    """

    def __init__(self, optimizer: Optimizer, backend: Backend, threads: int | None = None) -> None:
        """`threads`: how many take part in an update where the backend does not say; None: one a core. The bits do not
        depend on it."""
        super().__init__(optimizer, backend)
        self._threads = backend.threads or threads or core_count()
        self._steps = steps_of(optimizer, backend, self._threads)
        self._rehearsed: set[int] = set()
        """Ids of the arrays of whose steps a device is known to have all that they need."""
        self._reshaped: reshaping.Reshaped | None = None
        self._reserved: dict[int, FlatArray] = {}  # accumulators by array, for who asks first; taken out at one go
        self.window = Window(backend, self._threads, lambda: self._columns, self._changing)
        self._extras = Extras(optimizer, backend)

    # Other parameters

    def renumber(self, version: int, base_version: int) -> None:
        """Has the layout go on from the versions that it had in a server before."""
        self.layout = replace(self.layout, version=version, base_version=base_version)

    def rename(self, name: str, new_name: str, timeout_seconds: float = WAIT_SECONDS) -> None:
        """UnknownParameterError; the new name must be free."""
        layout = reshaping.renamed(self.layout, name, new_name)
        with self._changing("renaming a parameter", timeout_seconds):
            reshaping.relabel(self._columns, layout)
            self.layout = layout

    def prepare_reshape(self, layout: Layout, groups: Groups, anew: Container[str] = ()) -> None:
        """Makes all that `reshape` to this layout will need. OutOfMemoryError; nothing has changed."""
        self._check_groups(groups)
        with self.reading("making other flat arrays"):
            made_by = (self.optimizer, self.backend)
            found = reshaping.reshaped(self.layout, layout, self.version, self._columns, anew, made_by)
            for column in found.fresh.values():
                group = groups[column.array.group]
                self._steps.prepare(column, group)
                slots = made(column.slots.lacking(group), column.state_dtype, self.backend)
                column.slots.add(slots, self.optimizer.initial(group))
                if not self.backend.on_host:
                    self._steps.rehearse(column, group)
                    found.accumulators[column.array.array_id] = column.accumulator()
            self._reshaped = found

    def reshape(
        self,
        layout: Layout,
        groups: Groups,
        anew: Mapping[str, FlatArray],
        keep_state: bool = False,
        timeout_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Makes this the layout, one of `reshaping`'s. `anew` are values; these parameters' state begins again, unless it is
        kept, which needs the same shape and dtype. OutOfMemoryError; then nothing is changed."""
        prepared = self._reshaped
        if prepared is None or (prepared.version, prepared.layout) != (self.version, layout):
            self.prepare_reshape(layout, groups, anew)
        found, self._reshaped = self._reshaped, None
        if found is None:
            raise RuntimeError("what was prepared is gone: two threads reshape one store")
        with self._changing("the edit of a parameter", timeout_seconds):
            self._columns, self.layout = found.columns, layout
            self._reserved = found.carried_over(self._reserved) | found.accumulators
            self._rehearsed = {*found.carried_over(dict.fromkeys(self._rehearsed)), *found.accumulators}
            reshaping.relabel(self._columns, layout)
            for name, value in anew.items():
                place = layout.place(name)
                self._columns[place.array_id].set_value(place, value)
                if not keep_state:
                    self._columns[place.array_id].forget(place)
            self._create_state(groups)

    # Steps

    def accumulators(self, wanted: Container[int] | None = None) -> dict[int, FlatArray]:
        """Zeros for gradients, the caller's own: one array of the state dtype for each of these flat arrays; None: for all."""
        found = [column for column in self._columns if wanted is None or column.array.array_id in wanted]
        columns = {column.array.array_id: column for column in found}
        reserved = {array_id: self._reserved.pop(array_id, None) for array_id in columns}
        return {
            array_id: column.accumulator() if (kept := reserved[array_id]) is None else kept
            for array_id, column in columns.items()
        }

    def prepare(self, groups: Groups, timeout_seconds: float = WAIT_SECONDS) -> None:
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

    def create_state(self, groups: Groups, timeout_seconds: float = WAIT_SECONDS) -> None:
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
        sparse: Mapping[int, Rows] = _NO_ROWS,
        timeout_seconds: float = WAIT_SECONDS,
    ) -> None:
        """One step of every parameter whose index is not in `absent`; of those, weights, slots and step stay as they are.

        Gradients have the state or the wire dtype and are not changed; `scale` multiplies them first. An array of which all
        parameters are absent or `sparse` needs none: of these (by index, in the state dtype) the given rows alone are stepped,
        unless the optimizer moves all. InvalidArgumentError if a gradient is missing or does not fit, UnsupportedGradientError
        if the optimizer does not take its kind, OutOfMemoryError: then nothing changed.
        """
        with self._changing("the update", timeout_seconds):
            self._check_groups(groups)
            rows = row_entries(self.layout, self._columns, groups, sparse)
            everywhere = moving(self.optimizer, self.layout, groups, absent, sparse)
            self._allocate(groups)
            self._create_state(groups)
            entries = flat_entries(self._columns, groups, gradients, absent.union(sparse))
            entries += [as_flat(entry, self.backend) for entry in rows if entry.place.index in everywhere]
            some = [entry for entry in rows if entry.place.index not in everywhere]
            for column in (*(entry.column for entry in entries), *(entry.column for entry in some)):
                column.is_sealed = True
            self._steps.step(entries, scale, some)
            for entry in entries:
                entry.column.settle(entry.runs)
            self.window.clear()

    def check_kinds(self, groups: Groups, absent: frozenset[int], sparse: Mapping[int, Rows]) -> None:
        """UnsupportedGradientError if `update` would refuse gradients of these kinds."""
        self._check_groups(groups)
        moving(self.optimizer, self.layout, groups, absent, sparse)

    def sum_of_squares(self, sums: Sums, present: frozenset[int]) -> float:
        """Of these parameters' sums, in float64, in an order that depends on the layout, `present` and what is sparse."""
        dense, total = present - sums.sparse.keys(), 0.0
        for column in self._columns:
            for begin, end in column.spans(dense):
                total += self.backend.sum_of_squares(sums.dense[column.array.array_id][begin:end])
        for index in sorted(present & sums.sparse.keys()):
            total += self.backend.sum_of_squares(sums.sparse[index].values.reshape(-1))
        return total

    def search(self, groups: Groups) -> Search:
        """Begins a step of an optimizer that searches. OutOfMemoryError."""
        if not isinstance(self.optimizer, Searching):
            raise TypeError(f"{self.optimizer.name} does not search")
        self._check_groups(groups)
        with self.reading("a search"):
            vector = Vector(self.layout, self._columns, self.backend)
            trial = {column.array.array_id: copied(column.weights) for column in self._columns}
            return Search(self.optimizer, groups[0], vector, self._extras.state, trial)

    def adopt(self, outcome: Mapping[str, FlatArray], timeout_seconds: float = WAIT_SECONDS) -> None:
        """Takes over what a search has come to: parameters and state. The store is as it was when the search began."""
        with self._changing("the update", timeout_seconds):
            self._extras.adopt(outcome)
            Vector(self.layout, self._columns, self.backend).adopt(outcome[X])

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
        takes_dense = not self.optimizer.no_dense
        reserved = {array_id: columns[array_id].accumulator() for array_id in new if takes_dense}
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

    # State in and out

    def export(self, timeout_seconds: float = WAIT_SECONDS) -> StoreState:
        """Copies of everything of one version. Masters of 16-bit parameters are always among the state."""
        with self.reading("an export", timeout_seconds):
            content = StoreState({}, {}, {}, window_rounds=self.window.rounds)
            self.window.export(content.window)
            for column in self._columns:
                column.export(content)
            content.extras.update(self._extras.export())
        return content

    def check(self, content: StoreState, groups: Groups, with_values: bool, loaded: frozenset[str] | None = None) -> None:
        """InvalidStateDictError if `load` would refuse it."""
        self._check_groups(groups)
        check(content, self.layout, self.optimizer, groups, with_values, loaded)
        checked(content.window, content.window_rounds, self.layout)

    def load(
        self,
        content: StoreState,
        groups: Groups,
        with_values: bool,
        loaded: frozenset[str] | None = None,
        timeout_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Replaces optimizer state, and the weights and the running sum if `with_values`. A parameter without state begins
        again at step 0; those that are not among the `loaded` (None: all are) keep their state.

        `groups` are the hyperparameters that belong to the state. A master is taken where it narrows to the parameter's weight;
        elsewhere the weight was set by someone and wins. InvalidStateDictError if names or shapes do not fit, OutOfMemoryError;
        then nothing is changed.
        """
        self._check_groups(groups)
        found = check(content, self.layout, self.optimizer, groups, with_values, loaded)
        window = checked(content.window, content.window_rounds, self.layout)
        with self._changing("loading a state", timeout_seconds):
            if self.optimizer.stateful_from_creation:
                self._allocate(groups)
            shapes = [column.slots.lacking_for(shapes_of(found, column.places, self.optimizer)) for column in self._columns]
            arrays = [
                made(wanted, column.state_dtype, self.backend) for column, wanted in zip(self._columns, shapes, strict=True)
            ]
            extras = self._extras.loaded(content.extras, vector_dtype(self.layout))
            if with_values:
                self.window.load(window, content.window_rounds)
            for column, slots in zip(self._columns, arrays, strict=True):
                column.slots.add(slots, {})
                column.load(content, found, with_values, self.optimizer.counts_steps, loaded)
            self._extras.state = extras
            self._create_state(groups)

    def most_extras(self, groups: Groups) -> int:
        """Bytes that the state which belongs to no one parameter may have."""
        if not isinstance(self.optimizer, Searching):
            return 0
        return self.optimizer.most_vectors(groups[0]) * (vector_length(self.layout) + 1) * vector_dtype(self.layout).itemsize

    @property
    def state_bytes(self) -> int:
        """Weights, masters and optimizer state."""
        return sum(column.nbytes for column in self._columns) + self._extras.nbytes
