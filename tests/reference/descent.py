"""Optimizers that do not divide by the size of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reference.variant import Loop, State, Variant


def sgd(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    lr, mu, tau, decay = group["lr"], group["momentum"], group["dampening"], group["weight_decay"]
    result = []
    buffer = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = (-g if group["maximize"] else g) + decay * theta
        if mu != 0:
            b = mu * state["momentum_buffer"][i] + (1 - tau) * g if "momentum_buffer" in state else g
            buffer.append(b)
            g = g + mu * b if group["nesterov"] else b
        result.append(theta - lr * g)
    if mu != 0:
        state["momentum_buffer"] = buffer
    return result


def asgd(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    t = state["step"] = state.get("step", 0) + 1
    # As torch keeps them: the rate and the weight in the average that a step uses are float32, and of the step before.
    eta, mu = state.setdefault("eta", float(np.float32(group["lr"]))), state.setdefault("mu", 1.0)
    average = state.setdefault("ax", [0.0] * len(parameter))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        slope = (-g if group["maximize"] else g) + group["weight_decay"] * theta
        new = theta - eta * (slope + group["lambd"] * theta)
        average[i] = (1 - mu) * average[i] + mu * new
        result.append(new)
    state["eta"] = float(np.float32(group["lr"] * (1 + group["lambd"] * group["lr"] * t) ** -group["alpha"]))
    state["mu"] = float(np.float32(1 / (t - group["t0"]))) if t > group["t0"] + 1 else 1.0
    return result


def rprop(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    (shrink, grow), (smallest, largest) = group["etas"], group["step_sizes"]
    state["step"] = state.get("step", 0) + 1
    before = state.setdefault("prev", [0.0] * len(parameter))
    size = state.setdefault("step_size", [float(group["lr"])] * len(parameter))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = -g if group["maximize"] else g
        if before[i] * g > 0:
            size[i] = min(size[i] * grow, largest)
        elif before[i] * g < 0:
            size[i] = max(size[i] * shrink, smallest)
            g = 0.0  # this step does not move, and the next does not compare
        size[i] = min(max(size[i], smallest), largest)  # torch: also where the sign says nothing, as at first
        before[i] = g
        result.append(theta - size[i] if g > 0 else theta + size[i] if g < 0 else theta)
    return result


def lion(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    momentum = state.setdefault("exp_avg", [0.0] * len(parameter))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = -g if group["maximize"] else g
        direction = beta1 * momentum[i] + (1 - beta1) * g
        update = (direction > 0) - (direction < 0)
        result.append(theta - lr * (update + decay * theta))
        momentum[i] = beta2 * momentum[i] + (1 - beta2) * g
    return result


LOOPS: dict[str, Loop] = {"asgd": asgd, "lion": lion, "rprop": rprop, "sgd": sgd}

VARIANTS: list[Variant] = [
    Variant("asgd", {"lr": 0.05}, in_float16=True),
    Variant("asgd", {"lr": 0.05, "lambd": 0.3, "alpha": 0.5, "t0": 4, "weight_decay": 0.1}, in_float16=True),
    Variant("asgd", {"lr": 0.02, "t0": 0, "maximize": True}),
    Variant("lion", {"lr": 0.01}),
    Variant("lion", {"lr": 0.02, "betas": (0.4, 0.7), "weight_decay": 0.3, "maximize": True}),
    Variant("rprop", {"lr": 0.02}, in_float16=True),
    Variant("rprop", {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.02, 0.15), "maximize": True}),
    Variant("sgd", {"lr": 0.05}, in_float16=True),
    Variant("sgd", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.9}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True}, in_float16=True),
]
