"""The optimizers, each written once: pure functions of one element, with their hyperparameters and host scalars."""

from __future__ import annotations

from optserve.server.formulas.adam import ADAM
from optserve.server.formulas.adamw import ADAMW
from optserve.server.formulas.definition import Group, Optimizer
from optserve.server.formulas.language import FormulaError
from optserve.server.formulas.sgd import SGD

__all__ = ["OPTIMIZERS", "FormulaError", "Group", "Optimizer", "find"]

OPTIMIZERS: dict[str, Optimizer] = {
    "adam": ADAM,
    "adamw": ADAMW,
    "sgd": SGD,
}


def find(name: str) -> Optimizer:
    """The optimizer of that name, in whatever case. KeyError if there is none."""
    return OPTIMIZERS[name.lower()]
