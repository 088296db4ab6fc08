"""The optimizers, each written once: pure functions of an element or a tensor, with hyperparameters and host scalars."""

from __future__ import annotations

from optserve.server.formulas.adadelta import ADADELTA
from optserve.server.formulas.adafactor import ADAFACTOR
from optserve.server.formulas.adagrad import ADAGRAD
from optserve.server.formulas.adam import ADAM
from optserve.server.formulas.adamax import ADAMAX
from optserve.server.formulas.adamw import ADAMW
from optserve.server.formulas.asgd import ASGD
from optserve.server.formulas.definition import Elementwise, Group, Optimizer, Searching, Tensorwise
from optserve.server.formulas.lamb import LAMB
from optserve.server.formulas.language import FormulaError
from optserve.server.formulas.lars import LARS
from optserve.server.formulas.lbfgs import LBFGS
from optserve.server.formulas.lion import LION
from optserve.server.formulas.muon import MUON
from optserve.server.formulas.nadam import NADAM
from optserve.server.formulas.radam import RADAM
from optserve.server.formulas.rmsprop import RMSPROP
from optserve.server.formulas.rprop import RPROP
from optserve.server.formulas.sgd import SGD
from optserve.server.formulas.sparse_adam import SPARSE_ADAM

__all__ = ["OPTIMIZERS", "Elementwise", "FormulaError", "Group", "Optimizer", "Searching", "Tensorwise", "find"]

OPTIMIZERS: dict[str, Optimizer] = {
    "adadelta": ADADELTA,
    "adafactor": ADAFACTOR,
    "adagrad": ADAGRAD,
    "adam": ADAM,
    "adamax": ADAMAX,
    "adamw": ADAMW,
    "asgd": ASGD,
    "lamb": LAMB,
    "lars": LARS,
    "lbfgs": LBFGS,
    "lion": LION,
    "muon": MUON,
    "nadam": NADAM,
    "radam": RADAM,
    "rmsprop": RMSPROP,
    "rprop": RPROP,
    "sgd": SGD,
    "sparseadam": SPARSE_ADAM,
}


def find(name: str) -> Optimizer:
    """The optimizer of that name, in whatever case. KeyError if there is none."""
    return OPTIMIZERS[name.lower()]
