"""Optimizers that divide the gradient by a sum or mean of its squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from reference.variant import FAIR, Loop, State, Variant


def adadelta(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    rho, eps = group["rho"], group["eps"]
    state["step"] = state.get("step", 0) + 1
    squares = state.setdefault("square_avg", [0.0] * len(parameter))
    moves = state.setdefault("acc_delta", [0.0] * len(parameter))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = (-g if group["maximize"] else g) + group["weight_decay"] * theta
        squares[i] = rho * squares[i] + (1 - rho) * g**2
        move = sqrt((moves[i] + eps) / (squares[i] + eps)) * g
        moves[i] = rho * moves[i] + (1 - rho) * move**2
        result.append(theta - group["lr"] * move)
    return result


def adagrad(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    t = state["step"] = state.get("step", 0) + 1
    total = state.setdefault("sum", [float(group["initial_accumulator_value"])] * len(parameter))
    rate = group["lr"] / (1 + (t - 1) * group["lr_decay"])
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = (-g if group["maximize"] else g) + group["weight_decay"] * theta
        total[i] += g**2
        result.append(theta - rate * g / (sqrt(total[i]) + group["eps"]))
    return result


def rmsprop(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    alpha, mu = group["alpha"], group["momentum"]
    state["step"] = state.get("step", 0) + 1
    squares = state.setdefault("square_avg", [0.0] * len(parameter))
    means = state.setdefault("grad_avg", [0.0] * len(parameter)) if group["centered"] else None
    buffer = state.setdefault("momentum_buffer", [0.0] * len(parameter)) if mu else [0.0] * len(parameter)
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = (-g if group["maximize"] else g) + group["weight_decay"] * theta
        squares[i] = alpha * squares[i] + (1 - alpha) * g**2
        variance = squares[i]
        if means is not None:
            means[i] = alpha * means[i] + (1 - alpha) * g
            variance -= means[i] ** 2
        buffer[i] = mu * buffer[i] + g / (sqrt(variance) + group["eps"])
        result.append(theta - group["lr"] * buffer[i])
    return result


LOOPS: dict[str, Loop] = {"adadelta": adadelta, "adagrad": adagrad, "rmsprop": rmsprop}

VARIANTS: list[Variant] = [
    Variant("adadelta", {"lr": 1.0}, in_float16=True),
    Variant("adadelta", {"lr": 0.5, "rho": 0.6, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    Variant("adagrad", {"lr": 0.05}, in_float16=True, float16=FAIR),
    Variant("adagrad", {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2}),
    Variant("adagrad", {"lr": 0.05, "eps": 0.05, "weight_decay": 0.1, "maximize": True}),
    Variant("rmsprop", {"lr": 0.005}, in_float16=True, float16=FAIR),
    Variant("rmsprop", {"lr": 0.005, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1, "maximize": True, "eps": 0.05}),
    Variant("rmsprop", {"lr": 0.005, "alpha": 0.9, "centered": True, "eps": 0.05}, in_float16=True),
    # A large lr: of gradients that hardly change, the variance is what rounding leaves.
    Variant("rmsprop", {"lr": 0.3, "alpha": 0.4, "centered": True, "momentum": 0.5, "eps": 1.0}),
]
