"""LARS: SGD with momentum whose learning rate is scaled, tensor by tensor, by how its norm compares with its gradient's.

    λ_t = η ‖p_{t-1}‖ / (‖g_t‖ + β ‖p_{t-1}‖ + ε)
    v_t = μ v_{t-1} + γ λ_t (g_t + β p_{t-1})
    p_t = p_{t-1} - v_t

You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, Algorithm 1, with each parameter as a
layer; its polynomial decay of γ is a schedule's affair. η is `trust_coefficient`; γ is 1 unless given, a step of 1/1000 of
the norm. Deviations: ε, which other implementations have, is 0 unless given; λ is 1 where ‖p‖ or the denominator is 0, since a
tensor of zeros would stay so for ever. As in the paper, and unlike some later code, biases are scaled and decayed as all other
parameters are. torch has no LARS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.server.formulas import checks
from optserve.server.formulas.blocks import block_size, blocks, finite, norm
from optserve.server.formulas.definition import Group, Shape, Tensorwise

_DEFAULTS = {
    "lr": 1.0,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "trust_coefficient": 1e-3,
    "eps": 0.0,
    "maximize": False,
}


def check(group: Group) -> None:
    """In the words of torch's SGD."""
    checks.learning_rate(group)
    checks.at_least_zero(group, "momentum", "Invalid momentum value: {}")
    checks.weight_decay(group)
    checks.at_least_zero(group, "trust_coefficient", "Invalid trust_coefficient value: {}")
    checks.epsilon(group)
    checks.flag(group, "maximize")


def shapes(group: Group, shape: Shape) -> dict[str, Shape]:
    """Nothing is kept without momentum."""
    return {"momentum_buffer": shape} if group["momentum"] != 0 else {}


def update(xp: Any, group: Group, _step: int, _: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
    """One step of one parameter."""
    weight_decay, momentum = float(group["weight_decay"]), float(group["momentum"])
    p, g = p.reshape(-1), g.reshape(-1)
    velocity = state["momentum_buffer"].reshape(-1) if momentum != 0 else None
    rate = _rate(xp, group, p, g)
    buffer = xp.empty(block_size(xp, p.size), p.dtype)
    for block in blocks(xp, p.size):
        part, taken = p[block], g[block]
        decay = buffer[: part.size]
        if group["maximize"]:
            xp.negative(taken, out=taken)
        if weight_decay != 0:
            xp.multiply(part, weight_decay, out=decay)
            xp.add(taken, decay, out=taken)
        xp.multiply(taken, rate, out=taken)
        if velocity is not None:
            kept = velocity[block]
            xp.multiply(kept, momentum, out=kept)
            xp.add(kept, taken, out=kept)
            taken = kept
        xp.subtract(part, taken, out=part)


def _rate(xp: Any, group: Group, p: Any, g: Any) -> Any:
    """γλ, 0-d in the dtype of p."""
    lr, weight_decay, trust_coefficient, eps = (
        float(group[name]) for name in ("lr", "weight_decay", "trust_coefficient", "eps")
    )
    length = norm(xp, p)
    below = norm(xp, g) + weight_decay * length + eps
    trust = xp.where((length > 0) & (below > 0), trust_coefficient * length / below, 1.0)
    return finite(xp, lr * trust, p.dtype)


LARS = Tensorwise(
    name="LARS",
    defaults=_DEFAULTS,
    slot_keys=("momentum_buffer",),
    counts_steps=False,
    check=check,
    shapes=shapes,
    update=update,
)
