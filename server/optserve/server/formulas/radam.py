"""RAdam, as torch.optim.RAdam: Adam that waits with adapting until the variance of its second moment is known to be small.

    m_t = β1 m_{t-1} + (1 - β1) g_t
    v_t = β2 v_{t-1} + (1 - β2) g_t²
    ρ_t = ρ_∞ - 2 t β2^t / (1 - β2^t), with ρ_∞ = 2 / (1 - β2) - 1
    r_t = √((ρ_t - 4) (ρ_t - 2) ρ_∞ / ((ρ_∞ - 4) (ρ_∞ - 2) ρ_t))
    p_t = p_{t-1} - γ / (1 - β1^t) · m_t · r_t √(1 - β2^t) / (√v_t + ε)     if ρ_t > 5
    p_t = p_{t-1} - γ / (1 - β1^t) · m_t                                    else

Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, which switches at 4 and has no ε; decoupled weight
decay: see adamw.py.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sqrt, where

_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "decoupled_weight_decay": False,
    "differentiable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)
    for name in ("decoupled_weight_decay", "maximize"):
        checks.flag(group, name)
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    decays, decoupled = group["weight_decay"] != 0, group["decoupled_weight_decay"]
    return {
        "maximize": group["maximize"],
        "decays_weights": decays and decoupled,
        "decays_gradient": decays and not decoupled,
        "lerps_from_gradient": group["betas"][0] <= 0.5,
    }


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """`adapts` is 1 or 0; the step size has all factors that no element changes."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = group["betas"]
    t = counted(step)
    correction = 1 - beta2**t
    last = 2 / (1 - beta2) - 1
    rho = last - 2 * t * beta2**t / correction
    rectification = 1.0
    if rho > 5:
        rectification = ((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) ** 0.5 * correction**0.5
    return {
        "adapts": float(rho > 5),
        "step_size": lr / (1 - beta1**t) * rectification,
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": group["eps"],
        "weight_decay": weight_decay,
        "shrinkage": 1 - lr * weight_decay,
    }


def radam(  # type: ignore[no-untyped-def]
    p, g, m, v,
    adapts, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, shrinkage,
    *, maximize, decays_weights, decays_gradient, lerps_from_gradient,
):  # fmt: skip
    """One element of one step."""
    if maximize:
        g = -g
    if decays_weights:
        p = p * shrinkage
    if decays_gradient:
        g = g + weight_decay * p
    if lerps_from_gradient:  # noqa: SIM108
        m = g - (g - m) * beta1
    else:
        m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    return p - step_size * m / where(adapts > 0, sqrt(v) + eps, 1), m, v


RADAM = Elementwise(
    name="RAdam",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_avg_sq"),
    check=check,
    options=options,
    scalars=scalars,
    formula=radam,
)
