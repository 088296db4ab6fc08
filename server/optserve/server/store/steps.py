"""One optimizer step as kernel calls on slices of flat arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optserve.server.backends import Kernel
from optserve.server.backends.threads import each
from optserve.server.store.column import Column, FlatArray

SLICE = 1 << 18
"""Elements below which handing work to another thread costs more than it saves."""


class Slice(NamedTuple):
    """Elements begin to end - 1 of a column, all at the same step."""

    kernel: Kernel
    column: Column
    slots: tuple[str, ...]
    gradients: FlatArray
    scalars: Mapping[str, float]
    begin: int
    end: int

    def run(self, scale: float) -> None:
        column, where = self.column, slice(self.begin, self.end)
        slots = [column.slots[slot][where] for slot in self.slots]
        weights = column.weights[where] if column.is_narrow else None
        self.kernel(column.masters[where], self.gradients[where], slots, self.scalars, scale, weights)


def run(work: Sequence[Slice], scale: float, threads: int) -> None:
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
