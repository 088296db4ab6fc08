"""One step of an elementwise optimizer as kernel calls on slices of flat arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optserve.server.backends import Backend, Kernel
from optserve.server.backends.threads import each
from optserve.server.formulas import Elementwise, Group
from optserve.server.store.column import Column, FlatArray, Run

SLICE = 1 << 18
"""Elements below which handing work to another thread costs more than it saves."""


class Entry(NamedTuple):
    """What a step does to a column: its group's hyperparameters, its gradient, and the parameters that have one."""

    column: Column
    group: Group
    gradient: FlatArray
    runs: Sequence[Run]


class Slice(NamedTuple):
    """Elements begin to end - 1 of a column, all at the same step."""

    kernel: Kernel
    column: Column
    slots: Sequence[FlatArray]
    gradients: FlatArray
    scalars: Mapping[str, float]
    begin: int
    end: int

    def run(self, scale: float) -> None:
        column, where = self.column, slice(self.begin, self.end)
        slots = [slot[where] for slot in self.slots]
        weights = None if column.narrow is None else column.narrow[where]
        self.kernel(column.masters[where], self.gradients[where], slots, self.scalars, scale, weights)


class ElementwiseSteps:
    """Steps columns of one optimizer. The store's lock is held around each call but `prepare`."""

    def __init__(self, optimizer: Elementwise, backend: Backend, threads: int) -> None:
        self._optimizer, self._backend, self._threads = optimizer, backend, threads

    def prepare(self, column: Column, group: Group) -> None:
        """Compiles what a step needs."""
        self._backend.prepare(column.array.dtype)
        self._backend.kernel(self._optimizer, self._optimizer.choices(group), column.array.dtype)

    def rehearse(self, _column: Column, _group: Group) -> None:
        """Kernels need no memory beyond their arguments."""

    def step(self, entries: Sequence[Entry], scale: float) -> None:
        """One step of all that the entries name; the state that it needs is there."""
        work: list[Slice] = []
        after: list[tuple[Column, Run, dict[str, float]]] = []
        for column, group, gradient, runs in entries:
            choices, initial = self._optimizer.choices(group), self._optimizer.initial(group)
            kernel = self._backend.kernel(self._optimizer, choices, column.array.dtype)
            slots = [column.slots[name] for name in self._optimizer.program(choices).slot_keys]
            for run in runs:
                column.begin(run.first, run.last, initial)
                number, carried = int(column.steps[run.first]) + 1 if slots else 1, column.scalars(run.first)
                scalars = self._optimizer.values(group, number, carried)
                work.append(Slice(kernel, column, slots, gradient, scalars, run.begin, run.end))
                if slots:
                    after.append((column, run, self._optimizer.carry(group, number, carried)))
        self._run(work, scale)
        for column, run, carried in after:
            column.stepped(run.first, run.last, carried)

    def _run(self, work: Sequence[Slice], scale: float) -> None:
        """Does the work, cut so that the threads end at about the same time. The bits do not depend on the cuts."""
        total = sum(piece.end - piece.begin for piece in work)
        if total <= SLICE or self._threads == 1:
            for piece in work:
                piece.run(scale)
            return
        size = max(SLICE, total // (8 * self._threads))
        pieces = [
            piece._replace(begin=begin, end=min(begin + size, piece.end))
            for piece in work
            for begin in range(piece.begin, piece.end, size)
        ]
        each(lambda piece: piece.run(scale), pieces, self._threads)
