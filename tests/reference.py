"""Optimizers as textbooks write them: one loop over float64 elements each, with nothing shared with optserve or torch.

Each takes a group's hyperparameters and, for one parameter, its elements, its gradients' elements and its state (changed in
place; empty at first), and returns the new elements. VARIANTS says with which hyperparameters the tests run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

State = dict[str, Any]


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


LOOPS: dict[str, Callable[[Mapping[str, Any], Sequence[float], Sequence[float], State], list[float]]] = {
    "adam": adam,
    "adamw": adam,
    "sgd": sgd,
}


@dataclass(frozen=True)
class Variant:
    """An optimizer with hyperparameters, and what the tests must know of the two together."""

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_long: bool = False
    """Also a hundred steps, and a hundred in 16 bits, beside torch: one or two variants of an optimizer are enough."""
    may_cancel: bool = False
    """Decay may cancel the gradient just before it is divided by its own size; the sign of the whole step is then rounding."""
    sixteen_bits: Mapping[str, Any] = field(default_factory=dict)
    """Options that make torch, whose state has 16 bits too, a fair opponent."""

    def __str__(self) -> str:
        return "-".join([self.optimizer, *(f"{name}={value}" for name, value in self.options.items())])


FAIR = {"eps": 1e-3}  # torch's float16 Adam divides by zero where eps is 1e-8

VARIANTS: list[Variant] = [
    Variant("sgd", {"lr": 0.05}, is_long=True),
    Variant("sgd", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.9}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    Variant("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True}, is_long=True),
    Variant("adam", {"lr": 0.01}, is_long=True, sixteen_bits=FAIR),
    Variant("adam", {"lr": 0.01, "eps": 0.05, "betas": (0.8, 0.9)}),
    Variant("adam", {"lr": 0.01, "betas": (0.3, 0.95), "weight_decay": 0.1}, may_cancel=True),
    Variant("adam", {"lr": 0.01, "betas": (0.0, 0.9), "maximize": True}),
    Variant(
        "adam",
        {"lr": 0.01, "betas": (0.9, 0.7), "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        is_long=True,
        may_cancel=True,
        sixteen_bits=FAIR,
    ),
    Variant("adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Variant("adamw", {"lr": 0.01}, is_long=True, sixteen_bits=FAIR),
    Variant("adamw", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "betas": (0.9, 0.7)}),
]
"""Together they take every branch of every formula. Tests choose among them by their fields; their order means nothing."""
