"""Averaged stochastic gradient descent, as torch.optim.ASGD.

    p_t = (1 - λ η_t) p_{t-1} - η_t g_t
    a_t = a_{t-1} + μ_t (p_t - a_{t-1})
    η_{t+1} = γ / (1 + λ γ t)^α, from η_1 = γ
    μ_{t+1} = 1 / max(1, t - t0), from μ_1 = 1

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992. a, the average of the parameters since t0,
is state that nothing reads. torch keeps η and μ in float32 from one step to the next, and so do we: an edited γ acts one step
late. Deviations from torch: λ, α and t0 that are NaN are refused; where its host arithmetic raises (λ < 0 after many steps,
numbers beyond a float64), η becomes infinite or NaN.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted, power, quotient
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import where

_DEFAULTS = {
    "lr": 1e-2,
    "lambd": 1e-4,
    "alpha": 0.75,
    "t0": 1e6,
    "weight_decay": 0,
    "foreach": None,
    "maximize": False,
    "differentiable": False,
    "capturable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.weight_decay(group)
    for name in ("lambd", "alpha", "t0"):
        checks.not_nan(group, name)
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"], "decays": group["weight_decay"] != 0}


def initial(group: Group) -> dict[str, float]:
    """Of the first step."""
    return {"eta": group["lr"], "mu": 1.0}


def scalars(group: Group, _: int, carried: Carried) -> dict[str, float]:
    """η and μ as the step before left them."""
    eta = carried["eta"]
    return {
        "eta": eta,
        "shrinkage": 1 - float(group["lambd"]) * eta,
        "mu": carried["mu"],
        "weight_decay": group["weight_decay"],
    }


def carry(group: Group, step: int, _: Carried) -> dict[str, float]:
    """η and μ of the next step."""
    lr, lambd, alpha, t0 = (float(group[name]) for name in ("lr", "lambd", "alpha", "t0"))
    t = counted(step)
    return {"eta": quotient(lr, power(1 + lambd * lr * t, alpha)), "mu": 1 / max(1.0, t - t0)}


def asgd(p, g, a, eta, shrinkage, mu, weight_decay, *, maximize, decays):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    p = p * shrinkage - eta * g
    return p, where(mu == 1, p, a + (p - a) * mu)


ASGD = Elementwise(
    name="ASGD",
    defaults=_DEFAULTS,
    slot_keys=("ax",),
    scalar_keys=("eta", "mu"),
    initial=initial,
    check=check,
    options=options,
    scalars=scalars,
    carry=carry,
    formula=asgd,
)
