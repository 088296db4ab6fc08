"""One step of an optimizer that looks at whole parameters: array functions, a parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from optserve.server.backends import Backend
from optserve.server.backends.threads import each
from optserve.server.formulas import Group, Tensorwise
from optserve.server.store.column import Column, FlatArray
from optserve.server.store.rows import RowEntry
from optserve.server.store.slots import made, real_shape, slot_shapes
from optserve.server.store.steps import Entry
from optserve.wire.errors import OutOfMemoryError
from optserve.wire.layout import Place


class Tensor(NamedTuple):
    """One parameter, by its position in its column, with the names of the slots that it needs."""

    column: Column
    position: int
    group: Group
    gradient: FlatArray
    slots: Sequence[str]

    @property
    def size(self) -> int:
        return self.column.places[self.position].size


class TensorwiseSteps:
    """Steps columns of one optimizer. The store's lock is held around each call but `prepare` and `rehearse`."""

    def __init__(self, optimizer: Tensorwise, backend: Backend, threads: int) -> None:
        self._optimizer, self._backend, self._threads = optimizer, backend, threads

    def prepare(self, column: Column, _: Group) -> None:
        """Compiles what a step needs."""
        self._backend.prepare(column.array.dtype)

    def rehearse(self, column: Column, group: Group) -> None:
        """Steps zeros as large as the column's largest parameter of each number of dimensions: a device keeps the memory that
        temporaries need, and compiles. OutOfMemoryError."""
        for place in {len(place.shape): place for place in sorted(column.places, key=lambda place: place.size)}.values():
            self._rehearse(column, group, place)

    def _rehearse(self, column: Column, group: Group, place: Place) -> None:
        shape, slots = real_shape(place), slot_shapes(self._optimizer, group, place)
        p, g = (made({"": shape}, column.state_dtype, self._backend)[""] for _ in range(2))
        state = made(slots, column.state_dtype, self._backend)

        def work() -> None:
            with np.errstate(all="ignore"), _memory(place, "nothing was changed"):
                self._optimizer.step(self._backend.xp, group, 1, place.dtype, p, g, state)

        self._backend.run(work, compiles=True)

    def step(self, entries: Sequence[Entry], scale: float, _rows: Sequence[RowEntry] = ()) -> None:
        """One step of all that the entries name; the state that it needs is there. No such optimizer takes rows."""
        work: list[Tensor] = []
        for column, group, gradient, runs, _ in entries:
            placed, initial = self._backend.place(gradient), self._optimizer.initial(group)
            for position in (position for run in runs for position in range(run.first, run.last)):
                column.begin(position, position + 1, initial)
                slots = tuple(slot_shapes(self._optimizer, group, column.places[position]))
                work.append(Tensor(column, position, group, placed, slots))
        work.sort(key=lambda tensor: -tensor.size)
        each(lambda tensor: self._backend.run(lambda: self._update(tensor, scale)), work, self._threads)
        for tensor in work:
            if tensor.slots:
                tensor.column.stepped(tensor.position, tensor.position + 1, {})

    def _update(self, tensor: Tensor, scale: float) -> None:
        column, xp, dtype = tensor.column, self._backend.xp, tensor.column.state_dtype
        place = column.places[tensor.position]
        where, shape = slice(place.offset, place.offset + place.size), real_shape(place)
        number = int(column.steps[tensor.position]) + 1 if tensor.slots else 1
        state = {slot: column.slots[tensor.position, slot] for slot in tensor.slots}
        with np.errstate(all="ignore"), _memory(place, "larger ones may have been stepped"):
            gradient = xp.empty(shape, dtype)  # an array also where it is 0-d
            xp.multiply(tensor.gradient[where].reshape(shape), dtype.type(scale), out=gradient, dtype=dtype)
            self._optimizer.step(xp, tensor.group, number, place.dtype, column.masters[where].reshape(shape), gradient, state)


@contextmanager
def _memory(place: Place, outcome: str) -> Iterator[None]:
    """OutOfMemoryError for MemoryError, unless it is the backend's own."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except MemoryError as error:
        what = f"no memory for what a step of parameter {place.name!r} of {place.size} elements computes"
        raise OutOfMemoryError(f"{what}; {outcome}") from error
