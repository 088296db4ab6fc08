"""The rounds that are summed up until the optimizer steps with their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Elementwise
from optserve.server.store.column import Column, FlatArray, reals
from optserve.server.store.slots import real_shape
from optserve.server.store.steps import Slice, run_slices
from optserve.server.store.sums import IDS, ROWS, SUM, shaped_rows
from optserve.wire.errors import RanksDisagreeError
from optserve.wire.rows import Rows, Sums, row_size


def running_sum(p, g, own, *, scales, adds):  # type: ignore[no-untyped-def]
    """One element of the sum: p of this round, g of the rounds before."""
    if scales:
        p = own * p
        if adds:
            p = p + g
    else:
        p = g
    return p


_SUM = Elementwise(
    name="RunningSum",
    defaults={},
    slot_keys=(),
    check=lambda _: None,
    options=lambda _: {},
    scalars=lambda *_: {},
    formula=running_sum,
)
"""As a kernel, so that all backends add with the same bits."""

_ADDED, _FIRST, _COPIED = ({"scales": scales, "adds": adds} for scales, adds in ((True, True), (True, False), (False, False)))


class Window:
    """The running sum of a job's window. The store's lock guards it.

    `columns` and `changing` are the store's: its columns, and how it begins to change. The memory is made when it is first
    needed, and freed when a step finds an empty window: then there is no accumulation any more.
    """

    def __init__(
        self,
        backend: Backend,
        threads: int,
        columns: Callable[[], Sequence[Column]],
        changing: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._backend, self._threads, self._columns, self._changing = backend, threads, columns, changing
        self._dense: dict[int, FlatArray] = {}
        """Elements of parameters that have no dense gradient in the sum hold anything."""
        self._sparse: dict[int, Rows] = {}
        self.rounds = 0
        """How many rounds are in the sum."""
        self.present: frozenset[int] = frozenset()
        """Indices of the parameters that have a gradient in it."""

    def prepare(self) -> None:
        """Compiles its kernels."""
        for dtype in {column.state_dtype for column in self._columns()}:
            for choices in (_ADDED, _FIRST, _COPIED):
                self._backend.kernel(_SUM, choices, dtype)

    def added(self, sums: Sums, present: frozenset[int], scale: float) -> tuple[Sums, frozenset[int]]:
        """The running sum plus `scale` times a round's, and which parameters have a gradient in it.

        In the round's own arrays where it has them. RanksDisagreeError if a parameter is sparse in one and dense in the other,
        OutOfMemoryError; then nothing has changed.
        """
        self._check_kinds(sums, present)
        old, new = self.present - self._sparse.keys(), present - sums.sparse.keys()
        dense: dict[int, FlatArray] = {}
        work: list[Slice] = []
        for column in self._columns():
            array_id = column.array.array_id
            if not column.spans(old | new):
                continue
            running = self._running(column)
            total = dense[array_id] = sums.dense[array_id] if column.spans(new) else running
            if total is not running:
                for indices, choices in ((old & new, _ADDED), (new - old, _FIRST), (old - new, _COPIED)):
                    work += self._slices(column, indices, choices, total, running, scale)
        run_slices(work, 1.0, self._threads)
        return Sums(dense, self._added_rows(sums.sparse, scale)), self.present | present

    def _check_kinds(self, sums: Sums, present: frozenset[int]) -> None:
        places = {place.index: place for column in self._columns() for place in column.places}
        for index in sorted(present & self.present):
            now, before = index in sums.sparse, index in self._sparse
            if now != before:
                kinds = ("dense", "sparse")
                raise RanksDisagreeError(
                    f"the gradient of parameter {places[index].name!r} is {kinds[now]} in this round and {kinds[before]} in "
                    f"the {self.rounds} before that wait for a step; nothing was applied, push again with the same kind",
                    parameter=places[index].name,
                )

    def _running(self, column: Column) -> FlatArray:
        array_id = column.array.array_id
        found = self._dense.get(array_id)
        if found is None or not column.takes(found):  # between windows a parameter may have been replaced or removed
            found = self._dense[array_id] = column.accumulator()
        return found

    def _slices(
        self, column: Column, indices: frozenset[int], choices: dict[str, bool], into: FlatArray, other: FlatArray, own: float
    ) -> list[Slice]:
        spans = column.spans(indices)
        if not spans:
            return []
        kernel = self._backend.kernel(_SUM, choices, column.state_dtype)
        return [Slice(kernel, into, other, 0, (), None, {"own": own}, begin, end) for begin, end in spans]

    def _added_rows(self, sparse: Mapping[int, Rows], scale: float) -> dict[int, Rows]:
        found = dict(self._sparse)
        with np.errstate(all="ignore"):
            for index, (ids, values) in sparse.items():
                scaled = values * values.dtype.type(scale)
                found[index] = _union(found[index], ids, scaled) if index in found else Rows(ids, scaled)
        return found

    def keep(self, sums: Sums, present: frozenset[int], rounds: int) -> None:
        """Makes this the running sum, of so many rounds. The arrays stay the caller's; the rows are not to change any more."""
        with self._changing("keeping the running sum"):
            work: list[Slice] = []
            for column in self._columns():
                total = sums.dense.get(column.array.array_id)
                if column.spans(present - sums.sparse.keys()) and total is not None:
                    running = self._running(column)
                    if total is not running:
                        work += self._slices(column, present - sums.sparse.keys(), _COPIED, running, total, 0.0)
            run_slices(work, 1.0, self._threads)
            self._sparse = dict(sums.sparse)
            self.rounds, self.present = rounds, present

    def clear(self) -> None:
        """Begins a new window. With the store's lock held, as what follows; so is `export`."""
        if not self.rounds:
            self._dense = {}
        self._sparse = {}
        self.rounds, self.present = 0, frozenset()

    # State in and out

    def export(self, window: dict[str, FlatArray]) -> None:
        """Adds copies, under the names that StoreState has for them."""
        for column in self._columns():
            for place in column.places:
                rows = self._sparse.get(place.index)
                if rows is not None:
                    window[f"{IDS}/{place.name}"] = rows.ids.copy()
                    window[f"{ROWS}/{place.name}"] = shaped_rows(rows.values.copy(), place)
                elif place.index in self.present:
                    own = self._dense[place.array_id][place.offset : place.offset + place.size]
                    window[f"{SUM}/{place.name}"] = column.outward(place, own.reshape(real_shape(place)))

    def load(self, found: Mapping[int, FlatArray | Rows], rounds: int) -> None:
        """Replaces the sum by what was checked, by index. OutOfMemoryError; then nothing has changed."""
        dense: dict[int, FlatArray] = {}
        sparse: dict[int, Rows] = {}
        for column in self._columns():
            for place in column.places:
                value = found.get(place.index)
                if isinstance(value, Rows):
                    ids, values = value
                    own = reals(values).astype(column.state_dtype).reshape(len(ids), row_size(place))
                    sparse[place.index] = Rows(ids.copy(), own)
                elif value is not None:
                    if place.array_id not in dense:
                        dense[place.array_id] = column.accumulator()
                    self._backend.write(dense[place.array_id][place.offset : place.offset + place.size], reals(value))
        self._dense, self._sparse = dense, sparse
        self.rounds, self.present = rounds, frozenset(found)


def _union(old: Rows, ids: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> Rows:
    """The sum of both where both have a row."""
    every = np.union1d(old.ids, ids)
    total = np.zeros((len(every), values.shape[1]), values.dtype)
    total[np.searchsorted(every, ids)] = values
    total[np.searchsorted(every, old.ids)] += old.values
    return Rows(every, total)
