"""The comparison with torch has teeth: a plausible mistake in an optimizer makes it fail, where the optimizer itself passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import NAMES, Build, Configuration, Step, Stock

from optserve.server.formulas import Elementwise, Optimizer, find
from optserve.server.formulas.language import maximum, sign, sqrt, where
from optserve.server.store import Store

Group = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Mutant:
    """A mistake, and the options by which it shows."""

    name: str
    mistake: str
    options: Mapping[str, Any]
    changes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name}-{self.mistake}"

    @property
    def optimizer(self) -> Optimizer:
        right = find(self.name)
        fresh = {"_programs": {}} if isinstance(right, Elementwise) else {}
        return replace(right, **fresh, **self.changes)


def another_step(name: str, change: Any) -> dict[str, Any]:
    """The host scalars of another step."""
    return {"scalars": lambda group, step, carried: find(name).scalars(group, change(step), carried)}


def another_group(name: str, **changes: Any) -> dict[str, Any]:
    """The kernel and the host scalars of another group."""
    right = find(name)
    return {
        "options": lambda group: right.options({**group, **changes}),
        "scalars": lambda group, step, carried: right.scalars({**group, **changes}, step, carried),
    }


def adam_eps_inside(p, g, m, v, v_max, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps,
                    *, maximize, decays_weights, decays_gradient, lerps_from_gradient, amsgrad):  # fmt: skip
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    return p - step_size * m / sqrt(v / root_correction / root_correction + eps * eps), m, v, v_max


def largest_not_kept(p, g, m, v, v_max, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps,
                     *, maximize, decays_weights, decays_gradient, lerps_from_gradient, amsgrad):  # fmt: skip
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    return p - step_size * m / (sqrt(maximum(v_max, v)) / root_correction + eps), m, v, v_max


def adadelta_swapped(p, g, v, u, lr, rho, one_minus_rho, eps, weight_decay, *, maximize, decays):
    v = v * rho + one_minus_rho * g * g
    delta = sqrt(v + eps) / sqrt(u + eps) * g
    u = u * rho + one_minus_rho * delta * delta
    return p - lr * delta, v, u


def adamax_eps_outside(p, g, m, u, step_size, beta1, one_minus_beta1, beta2, eps, weight_decay,
                       *, maximize, decays, lerps_from_gradient):  # fmt: skip
    m = m + one_minus_beta1 * (g - m)
    u = maximum(u * beta2, abs(g))
    return p - step_size * m / (u + eps), m, u


def rmsprop_eps_inside(p, g, v, b, a, lr, alpha, one_minus_alpha, eps, weight_decay, momentum,
                       *, maximize, decays, centered, lerps_from_gradient, has_momentum):  # fmt: skip
    v = v * alpha + one_minus_alpha * g * g
    return p - lr * g / sqrt(v + eps * eps), v, b, a


def rprop_keeps_gradient(p, g, previous, size, shrink, grow, smallest, largest, *, maximize):
    product = g * previous
    factor = where(product > 0, grow, where(product < 0, shrink, 1))
    size = size * factor
    size = where(size > largest, largest, where(size < smallest, smallest, size))
    return p - sign(g) * size, g, size


def unadjusted(xp: Any, group: Group, step: int, dtype: Any, p: Any, g: Any, state: Any) -> None:
    """Muon with the lr as it is given, of a matrix higher than wide."""
    ratio = math.sqrt(max(1, p.shape[0] / max(1, p.shape[1])))
    scaled = {**group, "lr": group["lr"] / ratio, "weight_decay": group["weight_decay"] * ratio}
    find("muon").update(xp, scaled, step, dtype, p, g, state)


def unclipped(xp: Any, group: Group, *arguments: Any) -> None:
    find("adafactor").update(xp, {**group, "d": math.inf}, *arguments)


def without_momentum(xp: Any, group: Group, *arguments: Any) -> None:
    find("muon").update(xp, {**group, "nesterov": False}, *arguments)


def with_other_decay(xp: Any, group: Group, *arguments: Any) -> None:
    find("adafactor").update(xp, {**group, "beta2_decay": -1.0}, *arguments)


DECAY = {"lr": 0.01, "weight_decay": 0.1}
MUTANTS = [
    Mutant("Adadelta", "swapped accumulators", {}, {"formula": adadelta_swapped}),
    Mutant("Adadelta", "swapped names", {}, {"slot_keys": ("acc_delta", "square_avg")}),
    Mutant("Adafactor", "no update clipping", {}, {"update": unclipped}),
    Mutant("Adafactor", "another beta2", {}, {"update": with_other_decay}),
    Mutant("Adagrad", "no lr_decay", {"lr_decay": 0.5}, another_group("adagrad", lr_decay=0)),
    Mutant("Adagrad", "lr_decay a step early", {"lr_decay": 0.5}, another_step("adagrad", lambda step: step + 1)),
    Mutant("Adagrad", "an empty sum", {"initial_accumulator_value": 0.1}, {"initial": lambda _: {}}),
    Mutant("Adam", "no bias correction", {}, another_step("adam", lambda _: 2**24)),
    Mutant("Adam", "bias correction of the next step", {}, another_step("adam", lambda step: step + 1)),
    Mutant("Adam", "eps inside the root", {"eps": 0.05}, {"formula": adam_eps_inside}),
    Mutant("Adam", "largest not kept", {"amsgrad": True, "betas": (0.9, 0.7)}, {"formula": largest_not_kept}),
    Mutant("Adam", "decoupled decay", DECAY, another_group("adam", decoupled_weight_decay=True)),
    Mutant("AdamW", "L2 for decoupled decay", DECAY, another_group("adamw", decoupled_weight_decay=False)),
    Mutant("Adamax", "eps outside the maximum", {"eps": 0.01}, {"formula": adamax_eps_outside}),
    Mutant("Adamax", "no bias correction", {}, another_step("adamax", lambda _: 2**24)),
    Mutant(
        "ASGD",
        "eta of the same step",
        {"lambd": 0.1},
        {"scalars": lambda *given: find("asgd").scalars(*given[:2], find("asgd").carry(*given))},
    ),
    Mutant(
        "ASGD",
        "average a step early",
        {"t0": 5},
        {"carry": lambda group, step, carried: find("asgd").carry(group, step + 1, carried)},
    ),
    Mutant("Muon", "no adjusted lr", {"lr": 0.01}, {"update": unadjusted}),
    Mutant("Muon", "no Nesterov", {"lr": 0.01}, {"update": without_momentum}),
    Mutant(
        "NAdam",
        "no product of mu",
        {},
        {"scalars": lambda group, step, _: find("nadam").scalars(group, step, {"mu_product": 1.0})},
    ),
    Mutant("NAdam", "product not kept", {}, {"carry": lambda *given: dict(given[2])}),
    Mutant(
        "NAdam",
        "L2 for decoupled decay",
        {**DECAY, "decoupled_weight_decay": True},
        another_group("nadam", decoupled_weight_decay=False),
    ),
    Mutant(
        "RAdam",
        "always rectified",
        {},
        {"scalars": lambda *given: {**find("radam").scalars(*given), "adapts": 1.0}},
    ),
    Mutant("RAdam", "never rectified", {}, {"scalars": lambda *given: {**find("radam").scalars(*given), "adapts": 0.0}}),
    Mutant("RMSprop", "eps inside the root", {"eps": 0.01}, {"formula": rmsprop_eps_inside}),
    Mutant("RMSprop", "not centered", {"centered": True}, another_group("rmsprop", centered=False)),
    Mutant("Rprop", "gradient kept where its sign turns", {}, {"formula": rprop_keeps_gradient}),
    Mutant("Rprop", "step sizes begin at 0", {}, {"initial": lambda _: {}}),
    Mutant("SGD", "dampened from the start", {"momentum": 0.9, "dampening": 0.1}, another_step("sgd", lambda step: step + 1)),
    Mutant("SGD", "no Nesterov", {"momentum": 0.9, "nesterov": True}, another_group("sgd", nesterov=False)),
]
SHAPES = {"w": (3, 4), "scalar": (), "tall": (70, 13)}


def test_every_optimizer_has_a_mutant() -> None:
    assert {mutant.name for mutant in MUTANTS} == set(NAMES)


def run(case: Configuration, mutant: Mutant, dtype: Any, loop: str, build: Build, step: Step) -> tuple[Stock, Store, Store]:
    """Twenty steps of torch, of the optimizer and of its mutant."""
    shapes = {name: shape for name, shape in SHAPES.items() if mutant.name != "Muon" or len(shape) == 2}
    first, group = oracle.initial(shapes, dtype), case.group
    stock = Stock(case.optimizer, case.options, first)
    right, wrong = (build(optimizer, "numpy", [first], [group], 1) for optimizer in (case.ours, mutant.optimizer))
    for index in range(20):
        stock.step(oracle.gradients(stock.values, index, loop, case.maximizes))
        for store in (right, wrong):
            step(store, [group], oracle.gradients(oracle.weights(store), index, loop, case.maximizes))
    return stock, right, wrong


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_is_found(mutant: Mutant, dtype: Any, loop: str, build: Build, step: Step) -> None:
    case = Configuration(mutant.name, mutant.options)
    stock, right, wrong = run(case, mutant, dtype, loop, build, step)
    oracle.compare(right.export(), stock, case, oracle.TOLERANCES[dtype])
    with pytest.raises(AssertionError):
        oracle.compare(wrong.export(), stock, case, oracle.TOLERANCES[dtype])


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if "t0" not in mutant.options], ids=str)
def test_a_mistake_is_found_by_a_configuration_of_torch(mutant: Mutant, build: Build, step: Step) -> None:
    """Every one, but for ASGD's averaging: in optim_db that begins after step 100."""
    found = []
    for case in oracle.configurations():
        if case.optimizer == mutant.name:
            stock, _, wrong = run(case, mutant, np.float64, "closed", build, step)
            try:
                oracle.compare(wrong.export(), stock, case, oracle.TOLERANCES[np.float64])
            except AssertionError:
                found.append(case.description)
    assert found
