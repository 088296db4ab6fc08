"""Optimizers that divide a mean of gradients by a mean of their sizes: Adam and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np

from reference.variant import FAIR, Loop, State, Variant


def adam(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    t = state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", [0.0] * len(parameter))
    second = state.setdefault("exp_avg_sq", [0.0] * len(parameter))
    largest = state.setdefault("max_exp_avg_sq", [0.0] * len(parameter)) if group["amsgrad"] else second
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        if group["maximize"]:
            g = -g
        if group["decoupled_weight_decay"]:
            theta = theta * (1 - lr * decay)
        else:
            g = g + decay * theta
        first[i] = beta1 * first[i] + (1 - beta1) * g
        second[i] = beta2 * second[i] + (1 - beta2) * g * g
        largest[i] = max(largest[i], second[i])
        corrected = first[i] / (1 - beta1**t)
        # torch corrects after the maximum is taken, the paper does not correct AMSGrad at all.
        result.append(theta - lr * corrected / (sqrt(largest[i] / (1 - beta2**t)) + eps))
    return result


def adamax(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    t = state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", [0.0] * len(parameter))
    norm = state.setdefault("exp_inf", [0.0] * len(parameter))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = (-g if group["maximize"] else g) + decay * theta
        first[i] = beta1 * first[i] + (1 - beta1) * g
        norm[i] = max(beta2 * norm[i], abs(g) + group["eps"])  # the paper has no eps
        result.append(theta - group["lr"] / (1 - beta1**t) * first[i] / norm[i])
    return result


def nadam(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    t = state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", [0.0] * len(parameter))
    second = state.setdefault("exp_avg_sq", [0.0] * len(parameter))
    mu, mu_next = (beta1 * (1 - 0.96 ** (k * group["momentum_decay"]) / 2) for k in (t, t + 1))
    # The product of all μ so far is in float32, as torch keeps it.
    product = state["mu_product"] = float(np.float32(state.get("mu_product", 1.0)) * np.float32(mu))
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        if group["maximize"]:
            g = -g
        if group["decoupled_weight_decay"]:
            theta -= lr * decay * theta
        else:
            g += decay * theta
        first[i] = beta1 * first[i] + (1 - beta1) * g
        second[i] = beta2 * second[i] + (1 - beta2) * g * g
        ahead = (1 - mu) * g / (1 - product) + mu_next * first[i] / (1 - product * mu_next)
        result.append(theta - lr * ahead / (sqrt(second[i] / (1 - beta2**t)) + group["eps"]))
    return result


def radam(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    t = state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", [0.0] * len(parameter))
    second = state.setdefault("exp_avg_sq", [0.0] * len(parameter))
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / (1 - beta2**t)
    result = []
    for i, (theta, g) in enumerate(zip(parameter, gradient, strict=True)):
        if group["maximize"]:
            g = -g
        if group["decoupled_weight_decay"]:
            theta -= lr * decay * theta
        else:
            g += decay * theta
        first[i] = beta1 * first[i] + (1 - beta1) * g
        second[i] = beta2 * second[i] + (1 - beta2) * g * g
        move = first[i] / (1 - beta1**t)
        if length > 5:  # the paper: 4
            tractable = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            move *= sqrt(tractable) * sqrt(1 - beta2**t) / (sqrt(second[i]) + group["eps"])
        result.append(theta - lr * move)
    return result


def sparse_adam(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    """Of rows that all have a gradient: then it is Adam, whose eps is not corrected."""
    (beta1, beta2), t = group["betas"], state["step"] + 1 if state else 1
    state.setdefault("exp_avg", [0.0] * len(parameter))
    state.setdefault("exp_avg_sq", [0.0] * len(parameter))
    state["step"] = t
    result = []
    for i, (theta, slope) in enumerate(zip(parameter, gradient, strict=True)):
        g = -slope if group["maximize"] else slope
        m = state["exp_avg"][i] = beta1 * state["exp_avg"][i] + (1 - beta1) * g
        v = state["exp_avg_sq"][i] = beta2 * state["exp_avg_sq"][i] + (1 - beta2) * g * g
        rate = group["lr"] * sqrt(1 - beta2**t) / (1 - beta1**t)
        result.append(theta - rate * m / (sqrt(v) + group["eps"]))
    return result


LOOPS: dict[str, Loop] = {
    "adam": adam,
    "adamax": adamax,
    "adamw": adam,
    "nadam": nadam,
    "radam": radam,
    "sparseadam": sparse_adam,
}

VARIANTS: list[Variant] = [
    Variant("adam", {"lr": 0.01}, in_float16=True, float16=FAIR),
    Variant("adam", {"lr": 0.01, "eps": 0.05, "betas": (0.8, 0.9)}),
    Variant("adam", {"lr": 0.01, "betas": (0.3, 0.95), "weight_decay": 0.1}),
    Variant("adam", {"lr": 0.01, "betas": (0.0, 0.9), "maximize": True}),
    Variant(
        "adam",
        {"lr": 0.01, "betas": (0.9, 0.7), "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        in_float16=True,
        float16=FAIR,
    ),
    Variant("adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Variant("adamax", {"lr": 0.01}, in_float16=True, float16=FAIR),
    Variant("adamax", {"lr": 0.01, "betas": (0.3, 0.8), "eps": 0.05}),
    Variant("adamax", {"lr": 0.02, "betas": (0.9, 0.6), "weight_decay": 0.1, "maximize": True}),
    Variant("adamw", {"lr": 0.01}, in_float16=True, float16=FAIR),
    Variant("adamw", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "betas": (0.9, 0.7)}),
    Variant("nadam", {"lr": 0.002}, in_float16=True, float16=FAIR),
    Variant("nadam", {"lr": 0.002, "betas": (0.3, 0.9), "momentum_decay": 0.1, "weight_decay": 0.1}),
    Variant("nadam", {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True, "eps": 0.05, "maximize": True}),
    Variant("radam", {"lr": 0.01}, in_float16=True, float16=FAIR),
    Variant("radam", {"lr": 0.01, "betas": (0.4, 0.9), "weight_decay": 0.1}),
    Variant("radam", {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True, "eps": 0.05, "maximize": True}),
    Variant("radam", {"lr": 0.01, "betas": (0.9, 0.6)}),
    Variant("sparseadam", {"lr": 0.01}),
    Variant("sparseadam", {"lr": 0.01, "eps": 0.05, "betas": (0.3, 0.8), "maximize": True}),
]
