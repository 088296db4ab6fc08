"""Adagrad, as torch.optim.Adagrad.

    s_t = s_{t-1} + g_t², from s_0 = initial_accumulator_value
    p_t = p_{t-1} - γ / (1 + (t - 1) η) · g_t / (√s_t + ε), with η = lr_decay

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", 2011; η is torch's.
Deviations from torch: a group's own initial_accumulator_value counts, torch uses the one that the optimizer was made with; the
state of a group that is added later is made then, torch's at its first step.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sqrt

_DEFAULTS = {
    "lr": 1e-2,
    "lr_decay": 0,
    "eps": 1e-10,
    "weight_decay": 0,
    "initial_accumulator_value": 0,
    "foreach": None,
    "maximize": False,
    "differentiable": False,
    "fused": None,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.at_least_zero(group, "lr_decay", "Invalid lr_decay value: {}")
    checks.weight_decay(group)
    checks.at_least_zero(group, "initial_accumulator_value", "Invalid initial_accumulator_value value: {}")
    checks.epsilon(group)
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"], "decays": group["weight_decay"] != 0}


def sparse(group: Group) -> bool:
    """torch's refusal. The step size sinks for all rows alike."""
    if group["weight_decay"] != 0:
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    return False


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """The learning rate sinks as steps are counted."""
    lr, lr_decay = float(group["lr"]), float(group["lr_decay"])
    return {
        "step_size": lr / (1 + (counted(step) - 1) * lr_decay),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def initial(group: Group) -> dict[str, float]:
    """The sum does not begin empty."""
    return {"sum": group["initial_accumulator_value"]}


def adagrad(p, g, s, step_size, eps, weight_decay, *, maximize, decays):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    s = s + g * g
    return p - step_size * g / (sqrt(s) + eps), s


ADAGRAD = Elementwise(
    name="Adagrad",
    defaults=_DEFAULTS,
    slot_keys=("sum",),
    initial=initial,
    stateful_from_creation=True,
    check=check,
    sparse=sparse,
    options=options,
    scalars=scalars,
    formula=adagrad,
)
