"""The steps of each kind of optimizer."""

from __future__ import annotations

from optserve.server.backends import Backend
from optserve.server.formulas import Elementwise, Optimizer, Searching, Tensorwise
from optserve.server.store.search import SearchSteps
from optserve.server.store.steps import ElementwiseSteps
from optserve.server.store.tensors import TensorwiseSteps


def steps_of(optimizer: Optimizer, backend: Backend, threads: int) -> ElementwiseSteps | TensorwiseSteps | SearchSteps:
    """TypeError for an optimizer of no known kind."""
    match optimizer:
        case Elementwise():
            return ElementwiseSteps(optimizer, backend, threads)
        case Tensorwise():
            return TensorwiseSteps(optimizer, backend, threads)
        case Searching():
            return SearchSteps(optimizer, backend)
        case _:
            raise TypeError(f"{optimizer.name} is neither elementwise nor tensorwise, and does not search")
