"""One step of an optimizer that searches: its generator, and the weights at the points that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends import Backend
from optserve.server.formulas import Group, Searching
from optserve.server.formulas.definition import Evaluation
from optserve.server.store.column import Column
from optserve.server.store.extras import State, X, difference
from optserve.server.store.rows import RowEntry
from optserve.server.store.steps import Entry
from optserve.server.store.vector import Vector
from optserve.wire.errors import InvalidArgumentError, OutOfMemoryError
from optserve.wire.rows import Sums

FlatArray = npt.NDArray[Any]


class Search:
    """Not thread safe, and nothing of the store changes by it."""

    trial: Mapping[int, FlatArray]
    """Flat arrays of the wire dtypes, in host memory: the weights at the point that is asked for, until the next one."""
    outcome: Mapping[str, FlatArray]
    """What the step has come to, for Store.adopt."""

    def __init__(
        self, optimizer: Searching, group: Group, vector: Vector, begun: State, trial: Mapping[int, FlatArray]
    ) -> None:
        """`begun` is the state as it is; `trial`: flat arrays for this search. OutOfMemoryError."""
        self.trial = trial
        self._optimizer, self._backend, self._vector, self._begun = optimizer, vector.backend, vector, begun
        with self._memory():
            self._x = vector.masters()
            self._search = optimizer.search(vector.backend.xp, group, begun, self._x)
            self._advance(None)

    def evaluated(self, loss: float, sums: Sums, scale: float, absent: frozenset[int], clip_value: float | None) -> bool:
        """Takes in the loss and the gradient at the last point, first of all the weights as they are; whether the step is done.

        The gradient is `sums` times `scale`, its elements clipped to `clip_value`, and 0 for the parameters in `absent`.
        InvalidArgumentError if an array is missing, OutOfMemoryError: then the search is of no more use.
        """
        with self._memory():
            gradient = self._vector.gradient(sums, scale, absent)
            point, state = self._advance((loss, self._clipped(gradient, clip_value)))
            if state is not None:
                x = {X: self._backend.to_host(self._x)}
                self.outcome = x | difference(self._optimizer, self._begun, state, self._backend)
                return True
            self._vector.weights(self._backend.to_host(point), self.trial)
            return False

    def _clipped(self, gradient: FlatArray, bound: float | None) -> FlatArray:
        if bound is not None:
            limit = gradient.dtype.type(bound)
            self._backend.run(lambda: self._backend.xp.clip(gradient, -limit, limit, out=gradient))
        return gradient

    def _advance(self, evaluation: Evaluation | None) -> tuple[Any, Mapping[str, Any] | None]:
        """The point that is asked for, or the state that was come to."""

        def work() -> tuple[Any, Mapping[str, Any] | None]:
            with np.errstate(all="ignore"):
                try:
                    return (next(self._search) if evaluation is None else self._search.send(evaluation)), None
                except StopIteration as end:
                    return None, end.value

        return self._backend.run(work, compiles=True)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """OutOfMemoryError for MemoryError, unless it is the backend's own."""
        try:
            yield
        except OutOfMemoryError:
            raise
        except MemoryError as error:
            what = f"no memory for a step of {self._optimizer.name} over {self._vector.length} elements"
            raise OutOfMemoryError(f"{what}; nothing was changed") from error


class SearchSteps:
    """In the place of the steps of other optimizers: there is nothing to compile, and no step without a closure."""

    def __init__(self, optimizer: Searching, backend: Backend) -> None:
        self._optimizer, self._backend = optimizer, backend

    def prepare(self, column: Column, _: Group) -> None:
        """Compiles what the folding of gradients needs."""
        self._backend.prepare(column.array.dtype)

    def rehearse(self, _column: Column, _group: Group) -> None:
        """What a search needs is known when it searches."""

    def step(self, _entries: Sequence[Entry], _scale: float, _rows: Sequence[RowEntry] = ()) -> None:
        """InvalidArgumentError."""
        raise InvalidArgumentError(f"{self._optimizer.name} needs a closure: call worker.step(closure)")
