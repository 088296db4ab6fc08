"""One step of an elementwise optimizer as kernel calls on slices of flat arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optserve.server.backends import Backend, Kernel
from optserve.server.backends.threads import each
from optserve.server.formulas import Elementwise, Group
from optserve.server.store.column import Column, FlatArray, Run
from optserve.server.store.rows import RowEntry, Scratch, Touched

SLICE = 1 << 18
"""Elements below which handing work to another thread costs more than it saves."""

ROWS_SLICE = 1 << 15
"""The same for rows, which are spread over memory."""


class Entry(NamedTuple):
    """What a step does to a column: its group's hyperparameters, its gradient, and the parameters that have one.

    The gradient begins at the column's element `shift`.
    """

    column: Column
    group: Group
    gradient: FlatArray
    runs: Sequence[Run]
    shift: int = 0


class Slice(NamedTuple):
    """Elements begin to end - 1 of flat arrays, all at the same step. `gradients` begin at element `shift`."""

    kernel: Kernel
    masters: FlatArray
    gradients: FlatArray
    shift: int
    slots: Sequence[FlatArray]
    weights: FlatArray | None
    scalars: Mapping[str, float]
    begin: int
    end: int

    def run(self, scale: float) -> None:
        where = slice(self.begin, self.end)
        gradients = self.gradients[self.begin - self.shift : self.end - self.shift]
        slots = [slot[where] for slot in self.slots]
        weights = None if self.weights is None else self.weights[where]
        self.kernel(self.masters[where], gradients, slots, self.scalars, scale, weights)


def run_slices(work: Sequence[Slice], scale: float, threads: int) -> None:
    """Does the work, cut so that the threads end at about the same time. The bits do not depend on the cuts."""
    total = sum(piece.end - piece.begin for piece in work)
    if total <= SLICE or threads == 1:
        for piece in work:
            piece.run(scale)
        return
    size = max(SLICE, total // (8 * threads))
    pieces = [
        piece._replace(begin=begin, end=min(begin + size, piece.end))
        for piece in work
        for begin in range(piece.begin, piece.end, size)
    ]
    each(lambda piece: piece.run(scale), pieces, threads)


class ElementwiseSteps:
    """Steps columns of one optimizer. The store's lock is held around each call but `prepare`."""

    def __init__(self, optimizer: Elementwise, backend: Backend, threads: int) -> None:
        self._optimizer, self._backend, self._threads = optimizer, backend, threads

    def prepare(self, column: Column, group: Group) -> None:
        """Compiles what a step needs."""
        self._backend.prepare(column.array.dtype)
        self._kernel(column, group)

    def rehearse(self, _column: Column, _group: Group) -> None:
        """Kernels need no memory beyond their arguments."""

    def _kernel(self, column: Column, group: Group) -> tuple[Kernel, tuple[str, ...]]:
        """With the slots that it takes."""
        choices = self._optimizer.choices(group)
        kernel = self._backend.kernel(self._optimizer, choices, column.array.dtype)
        return kernel, self._optimizer.program(choices).slot_keys

    def step(self, entries: Sequence[Entry], scale: float, rows: Sequence[RowEntry] = ()) -> None:
        """One step of all that the entries name; the state that it needs is there. OutOfMemoryError for what rows need
        besides; then nothing has changed."""
        touched = [self._touched(entry) for entry in rows]
        room = self._room(touched)
        counts = _Counts(self._optimizer)
        work: list[Slice] = []
        for column, group, gradient, runs, shift in entries:
            kernel, names = self._kernel(column, group)
            slots = [column.slots[name] for name in names]
            for run in runs:
                scalars = counts.begin(column, run.first, run.last, group, bool(slots))
                piece = (kernel, column.masters, gradient, shift, slots, column.narrow, scalars, run.begin, run.end)
                work.append(Slice(*piece))
        given = [
            counts.begin(column, position, position + 1, group, bool(one.slot_count))
            for one in touched
            for column, position, group, _ in [one.entry]
        ]
        run_slices(work, scale, self._threads)
        self._step_rows(touched, given, room, scale)
        counts.end()

    def _touched(self, entry: RowEntry) -> Touched:
        kernel, names = self._kernel(entry.column, entry.group)
        return Touched(entry, kernel, [entry.column.slots[name] for name in names], self._backend)

    def _row_threads(self, touched: Sequence[Touched]) -> int:
        total = sum(one.entry.rows.values.size for one in touched)
        return max(1, min(self._threads, total // ROWS_SLICE))

    def _room(self, touched: Sequence[Touched]) -> list[list[Scratch]]:
        """For each parameter scratch memory for each thread."""
        threads = self._row_threads(touched)
        return [[one.scratch() for _ in range(threads)] if one.block_size else [] for one in touched]

    def _step_rows(
        self, touched: Sequence[Touched], given: Sequence[Mapping[str, float]], room: Sequence[list[Scratch]], scale: float
    ) -> None:
        def step(block: tuple[int, int]) -> None:
            at, first = block
            scratch = room[at].pop()  # there is one for each thread
            touched[at].step(first, scratch, given[at], scale)
            room[at].append(scratch)

        blocks = [
            (at, first)
            for at, one in enumerate(touched)
            if one.block_size
            for first in range(0, len(one.entry.rows.ids), one.rows_in_block)
        ]
        each(step, blocks, self._row_threads(touched))


class _Counts:
    """The steps of alike parameters: what they carry, and their number once the step is done."""

    def __init__(self, optimizer: Elementwise) -> None:
        self._optimizer = optimizer
        self._after: list[tuple[Column, int, int, Mapping[str, float]]] = []

    def begin(self, column: Column, first: int, last: int, group: Group, has_state: bool) -> Mapping[str, float]:
        """The scalars with which parameters first to last - 1 are stepped."""
        column.begin(first, last, self._optimizer.initial(group))
        number, carried = int(column.steps[first]) + 1 if has_state else 1, column.scalars(first)
        if has_state:
            self._after.append((column, first, last, self._optimizer.carry(group, number, carried)))
        return self._optimizer.values(group, number, carried)

    def end(self) -> None:
        for column, first, last, carried in self._after:
            column.stepped(first, last, carried)
