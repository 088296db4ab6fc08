"""Optimizers that scale each parameter's step by norms: a loop takes all of a parameter's elements, and not some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from typing import Any

from reference.variant import Loop, State, Variant


def norm(values: Sequence[float]) -> float:
    return sqrt(fsum(value * value for value in values))


def lamb(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
    t = state["step"] = state.get("step", 0) + 1
    first = state.setdefault("exp_avg", [0.0] * len(parameter))
    second = state.setdefault("exp_avg_sq", [0.0] * len(parameter))
    direction = []
    for i, (x, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = -g if group["maximize"] else g
        first[i] = beta1 * first[i] + (1 - beta1) * g
        second[i] = beta2 * second[i] + (1 - beta2) * g**2
        ratio = first[i] / (1 - beta1**t) / (sqrt(second[i] / (1 - beta2**t)) + eps)
        direction.append(ratio + decay * x)
    before, length = norm(parameter), norm(direction)
    trust = before / length if before > 0 and length > 0 else 1.0
    return [x - group["lr"] * trust * u for x, u in zip(parameter, direction, strict=True)]


def lars(group: Mapping[str, Any], parameter: Sequence[float], gradient: Sequence[float], state: State) -> list[float]:
    mu, decay = group["momentum"], group["weight_decay"]
    before = norm(parameter)
    below = norm(gradient) + decay * before + group["eps"]
    local = group["trust_coefficient"] * before / below if before > 0 and below > 0 else 1.0
    velocity = state.setdefault("momentum_buffer", [0.0] * len(parameter)) if mu else [0.0] * len(parameter)
    result = []
    for i, (w, g) in enumerate(zip(parameter, gradient, strict=True)):
        g = -g if group["maximize"] else g
        velocity[i] = mu * velocity[i] + group["lr"] * local * (g + decay * w)
        result.append(w - velocity[i])
    return result


LOOPS: dict[str, Loop] = {"lamb": lamb, "lars": lars}

VARIANTS: list[Variant] = [
    Variant("lamb", {"lr": 0.02}),
    Variant("lamb", {"lr": 0.02, "betas": (0.6, 0.8), "eps": 0.05, "weight_decay": 0.1}),
    Variant("lamb", {"lr": 0.01, "weight_decay": 0.05, "maximize": True}),
    Variant("lars", {"lr": 20.0}),
    Variant("lars", {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.03}),
    Variant("lars", {"lr": 0.5, "momentum": 0.6, "weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 0.3, "maximize": True}),
]
