"""Rprop, as torch.optim.Rprop: a step size for each element, larger while its gradient keeps its sign, smaller when that turns.

    s_t = s_{t-1} · (η⁺ if g_t g_{t-1} > 0, η⁻ if g_t g_{t-1} < 0, else 1), kept in [s_min, s_max], from s_0 = γ
    g_t becomes 0 if g_t g_{t-1} < 0
    p_t = p_{t-1} - sign(g_t) s_t

Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", 1993, in the form
without backtracking (iRprop⁻): Igel and Hüsken, 2000. γ acts at a parameter's first step only. Deviation from torch: bounds of
the step size that are NaN are refused.
"""

from __future__ import annotations

import math

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sign, where

_DEFAULTS = {
    "lr": 1e-2,
    "etas": (0.5, 1.2),
    "step_sizes": (1e-6, 50),
    "foreach": None,
    "maximize": False,
    "differentiable": False,
    "capturable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    shrink, grow = checks.pair(group, "etas")
    if not 0.0 < shrink < 1.0 < grow:
        raise ValueError(f"Invalid eta values: {shrink}, {grow}")
    smallest, largest = checks.pair(group, "step_sizes")
    if math.isnan(smallest) or math.isnan(largest):
        raise ValueError(f"Invalid step sizes: {smallest}, {largest}")
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"]}


def initial(group: Group) -> dict[str, float]:
    """The learning rate is where step sizes begin."""
    return {"step_size": group["lr"]}


def scalars(group: Group, _step: int, _: Carried) -> dict[str, float]:
    """The same at every step. Where the bounds are the wrong way round, the upper one counts: torch's clamp."""
    smallest, largest = group["step_sizes"]
    shrink, grow = group["etas"]
    return {"shrink": shrink, "grow": grow, "smallest": min(smallest, largest), "largest": largest}


def rprop(p, g, previous, size, shrink, grow, smallest, largest, *, maximize):  # type: ignore[no-untyped-def]
    """One element of one step. That a sign turned is read off the factor: torch's rule where η⁻ rounds to 1."""
    if maximize:
        g = -g
    product = g * previous
    factor = where(product > 0, grow, where(product < 0, shrink, 1))
    size = size * factor
    size = where(size > largest, largest, where(size < smallest, smallest, size))
    g = where(factor == shrink, 0, g)
    return p - sign(g) * size, g, size


RPROP = Elementwise(
    name="Rprop",
    defaults=_DEFAULTS,
    slot_keys=("prev", "step_size"),
    initial=initial,
    check=check,
    options=options,
    scalars=scalars,
    formula=rprop,
)
