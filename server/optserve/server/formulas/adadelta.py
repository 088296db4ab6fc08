"""Adadelta, as torch.optim.Adadelta.

    v_t = ρ v_{t-1} + (1 - ρ) g_t²
    Δ_t = √(u_{t-1} + ε) / √(v_t + ε) · g_t
    u_t = ρ u_{t-1} + (1 - ρ) Δ_t²
    p_t = p_{t-1} - γ Δ_t

Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, which has no γ (γ = 1).
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sqrt

_DEFAULTS = {
    "lr": 1.0,
    "rho": 0.9,
    "eps": 1e-6,
    "weight_decay": 0,
    "maximize": False,
    "capturable": False,
    "foreach": None,
    "differentiable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    rho = checks.number(group, "rho")
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"Invalid rho value: {rho}")
    checks.epsilon(group)
    checks.weight_decay(group)
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"], "decays": group["weight_decay"] != 0}


def scalars(group: Group, _step: int, _: Carried) -> dict[str, float]:
    """The same at every step."""
    rho = float(group["rho"])
    return {
        "lr": group["lr"],
        "rho": rho,
        "one_minus_rho": 1 - rho,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def adadelta(p, g, v, u, lr, rho, one_minus_rho, eps, weight_decay, *, maximize, decays):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    v = v * rho + one_minus_rho * g * g
    delta = sqrt(u + eps) / sqrt(v + eps) * g
    u = u * rho + one_minus_rho * delta * delta
    return p - lr * delta, v, u


ADADELTA = Elementwise(
    name="Adadelta",
    defaults=_DEFAULTS,
    slot_keys=("square_avg", "acc_delta"),
    check=check,
    options=options,
    scalars=scalars,
    formula=adadelta,
)
