"""Builds stores and gives them gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from every_backend import backend_named

from optserve.server.backends import Backend
from optserve.server.formulas import Optimizer
from optserve.server.store import Store
from optserve.wire.dtypes import state_dtype
from optserve.wire.layout import Place
from optserve.wire.rows import Rows, row_size

Arrays = Mapping[str, Any]


@pytest.fixture
def build() -> Callable[..., Store]:
    """build(optimizer, backend or its name, param groups as dicts of arrays, their hyperparameters, threads) -> Store"""

    def make(
        optimizer: Optimizer,
        backend: str | Backend,
        tensors: Sequence[Arrays],
        groups: Sequence[Arrays],
        threads: int | None = None,
    ) -> Store:
        store = Store(optimizer, backend_named(backend) if isinstance(backend, str) else backend, threads)
        for parameters in tensors:
            store.add_group([(name, value.shape, value.dtype) for name, value in parameters.items()])
            store.set_values(parameters)
        store.seal()
        store.prepare(groups)
        return store

    return make


def all_rows(place: Place, gradient: np.ndarray) -> Rows:
    """A gradient as one that has every row."""
    values = gradient.astype(state_dtype(gradient.dtype)).reshape(place.shape[0], row_size(place))
    return Rows(np.arange(place.shape[0]), values)


@pytest.fixture
def step() -> Callable[..., None]:
    """step(store, groups, gradients by name, scale): names that are None or not there are absent. An
    optimizer that takes no dense gradients gets all rows."""

    def update(store: Store, groups: Sequence[Arrays], gradients: Arrays, scale: float = 1.0) -> None:
        flats = store.accumulators()
        absent = {place.index for place in store.layout.places if gradients.get(place.name) is None}
        if store.optimizer.no_dense:
            present = [place for place in store.layout.places if place.index not in absent]
            rows = {place.index: all_rows(place, gradients[place.name]) for place in present}
            store.update(groups, {}, scale, frozenset(absent), rows)
            return
        for place in store.layout.places:
            if place.index not in absent:
                part = flats[place.array_id][place.offset : place.offset + place.size]
                store.backend.fold(part, np.ravel(gradients[place.name]), 1.0, True)
        store.update(groups, flats, scale, frozenset(absent))

    return update
