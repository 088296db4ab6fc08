"""Edits of every hyperparameter of an optimizer, and its steps with them without a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from optserve.client import SparseGradient, Worker, errors
from optserve.server.backends import select
from optserve.server.formulas import OPTIMIZERS, Optimizer, Searching
from optserve.server.jobs.spec import EXTRAS, edited, hyperparameters
from optserve.server.store import Store
from optserve.wire.rows import Rows, Sums

LOSS = 0.5


def others(value: Any) -> list[Any]:
    """Values of the same type, of which a check may refuse some."""
    if value is None:
        return [False, True, "match_rms_adamw", "strong_wolfe", 0.5, 7]
    if isinstance(value, str):
        return ["original", None]
    if isinstance(value, tuple):  # of which the numbers travel as floats
        value = tuple(float(entry) if isinstance(entry, int) else entry for entry in value)
        places = [(at, entry) for at in reversed(range(len(value))) for entry in others(value[at])]
        return [(*value[:at], entry, *value[at + 1 :]) for at, entry in places]
    if isinstance(value, bool):
        return [not value]
    steps = [value + 1, value - 1] if isinstance(value, int) else [value / 2, 2 * value]
    return [entry for entry in (*([] if value else [0.125]), *steps) if entry != value]


def proposals(optimizer: Optimizer, group: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Edits of one hyperparameter: alone, then with one more that may be in its way."""
    beside = [{key: v} for key, default in optimizer.defaults.items() if key != name for v in (default, *others(group[key]))]
    for more in ({}, *beside):
        for value in others(group.get(name, 0.0)):
            yield {**more, name: value}


def edits_of(optimizer: Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Edits that are allowed one after the other and change every hyperparameter; each with the group that it leaves."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    group: dict[str, Any] = hyperparameters(optimizer)
    names = {*optimizer.defaults, *EXTRAS}
    if isinstance(optimizer, Searching) or optimizer.no_dense:
        names.remove("l1")  # not of a closure's loss, nor with sparse gradients
    for name in sorted(names, key=[*optimizer.defaults, *sorted(EXTRAS)].index):
        for edit in proposals(optimizer, group, name):
            try:
                group = edited(optimizer, group, edit)
            except errors.InvalidHyperparameterError:
                continue
            found.append((edit, group))
            break
    assert {key for edit, _ in found for key in edit} == names
    return found


class Straight:
    """The same steps without a server: a store, its groups given by hand."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        optimizer = OPTIMIZERS[name]
        self.store = Store(optimizer, select("numpy"))
        self.store.add_group([(key, value.shape, value.dtype) for key, value in values.items()])
        self.store.set_values(values)
        self.store.seal()
        self.store.create_state([hyperparameters(optimizer)])

    def step(self, group: Mapping[str, Any], gradients: Mapping[str, Any]) -> dict[str, Any]:
        """With the same gradient, and loss, wherever an optimizer that searches asks for it."""
        store = self.store
        flats = store.accumulators()
        for place in store.layout.places:
            place.shaped(flats[place.array_id])[...] = gradients[place.name]
        if isinstance(store.optimizer, Searching):
            search = store.search([group])
            while not search.evaluated(LOSS, Sums(flats, {}), 1.0, frozenset(), None):
                pass
            store.adopt(search.outcome)
        elif store.optimizer.no_dense:
            rows = {place.index: Rows(np.arange(place.shape[0]), gradients[place.name]) for place in store.layout.places}
            store.update([group], {}, sparse=rows)
        else:
            store.update([group], flats)
        return dict(store.export().values)

    def state(self) -> dict[str, Any]:
        return dict(self.store.export().state)


def stepped(worker: Worker, optimizer: Optimizer, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """The weights after the same step of a worker."""
    if isinstance(optimizer, Searching):
        worker.step(lambda _: (LOSS, gradients))
        return worker.pull()
    if optimizer.no_dense:
        return worker.push_pull({name: SparseGradient(np.arange(len(rows)), rows) for name, rows in gradients.items()})
    return worker.push_pull(gradients)
