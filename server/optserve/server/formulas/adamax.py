"""Adamax, as torch.optim.Adamax: Adam with the infinity norm of past gradients in place of their root mean square.

    m_t = β1 m_{t-1} + (1 - β1) g_t
    u_t = max(β2 u_{t-1}, |g_t| + ε)
    p_t = p_{t-1} - γ / (1 - β1^t) · m_t / u_t

Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, section 7.1; ε, against a division by zero, is torch's.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import maximum

_DEFAULTS = {
    "lr": 2e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "foreach": None,
    "maximize": False,
    "differentiable": False,
    "capturable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {
        "maximize": group["maximize"],
        "decays": group["weight_decay"] != 0,
        "lerps_from_gradient": group["betas"][0] <= 0.5,
    }


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """Only the first moment is biased."""
    beta1, beta2 = group["betas"]
    return {
        "step_size": group["lr"] / (1 - beta1 ** counted(step)),
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def adamax(  # type: ignore[no-untyped-def]
    p, g, m, u, step_size, beta1, one_minus_beta1, beta2, eps, weight_decay, *, maximize, decays, lerps_from_gradient
):  # fmt: skip
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    if lerps_from_gradient:  # noqa: SIM108
        m = g - (g - m) * beta1
    else:
        m = m + one_minus_beta1 * (g - m)
    u = maximum(u * beta2, abs(g) + eps)
    return p - step_size * m / u, m, u


ADAMAX = Elementwise(
    name="Adamax",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_inf"),
    check=check,
    options=options,
    scalars=scalars,
    formula=adamax,
)
