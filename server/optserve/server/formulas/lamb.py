"""LAMB: Adam's direction, with a step as long as the tensor's own norm times γ.

    m_t = β1 m_{t-1} + (1 - β1) g_t
    v_t = β2 v_{t-1} + (1 - β2) g_t²
    r_t = m_t / (1 - β1^t) / (√(v_t / (1 - β2^t)) + ε)
    u_t = r_t + λ p_{t-1}
    p_t = p_{t-1} - γ ‖p_{t-1}‖ / ‖u_t‖ · u_t

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2019, arXiv 1904.00962, Algorithm 2,
with φ(z) = z and each parameter as a layer. Deviation, that of the authors' own code: the ratio of norms is 1 where one of them
is 0, since a tensor of zeros would stay so for ever. λ is 0 unless given; the paper trains BERT with 0.01. torch has no LAMB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.server.formulas import checks
from optserve.server.formulas.blocks import SquareSum, block_size, blocks, finite, scaled_add
from optserve.server.formulas.definition import Group, Shape, Tensorwise

_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "maximize": False,
}


def check(group: Group) -> None:
    """The checks of torch's Adam, for the hyperparameters that both have."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)
    checks.flag(group, "maximize")


def shapes(_: Group, shape: Shape) -> dict[str, Shape]:
    """Two moments of every element."""
    return {"exp_avg": shape, "exp_avg_sq": shape}


def update(xp: Any, group: Group, step: int, _: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
    """One step of one parameter; leaves its direction u in g."""
    p, g, m, v = (array.reshape(-1) for array in (p, g, state["exp_avg"], state["exp_avg_sq"]))
    size_of_p, size_of_u = SquareSum(xp, p.size), SquareSum(xp, p.size)
    buffer = xp.empty(block_size(xp, p.size), p.dtype)
    for block in blocks(xp, p.size):
        part = p[block]
        _direction(xp, group, step, part, g[block], m[block], v[block], buffer[: part.size])
        size_of_p.add(part)
        size_of_u.add(g[block])
    before, length = size_of_p.root(), size_of_u.root()
    ratio = xp.where((before > 0) & (length > 0), before / length, 1.0)
    scaled_add(xp, 1.0, p, -finite(xp, float(group["lr"]) * ratio, p.dtype), g)


def _direction(xp: Any, group: Group, step: int, p: Any, g: Any, m: Any, v: Any, buffer: Any) -> None:
    """The moments' update, and u in the place of g."""
    (beta1, beta2), eps, weight_decay = group["betas"], float(group["eps"]), float(group["weight_decay"])
    correction = 1 - beta1**step
    if group["maximize"]:
        xp.negative(g, out=g)
    xp.multiply(m, beta1, out=m)
    xp.multiply(g, 1 - beta1, out=buffer)
    xp.add(m, buffer, out=m)
    xp.multiply(v, beta2, out=v)
    xp.multiply(g, g, out=g)
    xp.multiply(g, 1 - beta2, out=g)
    xp.add(v, g, out=v)
    xp.sqrt(v, out=buffer)
    xp.multiply(buffer, correction / (1 - beta2**step) ** 0.5, out=buffer)
    xp.add(buffer, correction * eps, out=buffer)
    xp.divide(m, buffer, out=g)
    if weight_decay != 0:
        xp.multiply(p, weight_decay, out=buffer)
        xp.add(g, buffer, out=g)


LAMB = Tensorwise(
    name="LAMB",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_avg_sq"),
    check=check,
    shapes=shapes,
    update=update,
)
