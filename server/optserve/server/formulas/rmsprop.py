"""RMSprop, as torch.optim.RMSprop.

    v_t = α v_{t-1} + (1 - α) g_t²
    d_t = √v_t + ε, or √(v_t - a_t²) + ε with a_t = α a_{t-1} + (1 - α) g_t if centered
    b_t = μ b_{t-1} + g_t / d_t
    p_t = p_{t-1} - γ b_t

Hinton, "Neural Networks for Machine Learning", lecture 6, 2012; centered: Graves, "Generating Sequences With Recurrent Neural
Networks", 2013. As in torch, a centered variance that rounding leaves below zero makes the parameter NaN.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sqrt

_DEFAULTS = {
    "lr": 1e-2,
    "momentum": 0,
    "alpha": 0.99,
    "eps": 1e-8,
    "centered": False,
    "weight_decay": 0,
    "capturable": False,
    "foreach": None,
    "maximize": False,
    "differentiable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.at_least_zero(group, "momentum", "Invalid momentum value: {}")
    checks.weight_decay(group)
    checks.at_least_zero(group, "alpha", "Invalid alpha value: {}")
    for name in ("centered", "maximize"):
        checks.flag(group, name)
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {
        "maximize": group["maximize"],
        "decays": group["weight_decay"] != 0,
        "centered": group["centered"],
        "lerps_from_gradient": group["centered"] and abs(1 - float(group["alpha"])) >= 0.5,
        "has_momentum": group["momentum"] > 0,
    }


def scalars(group: Group, _step: int, _: Carried) -> dict[str, float]:
    """The same at every step."""
    alpha = float(group["alpha"])
    return {
        "lr": group["lr"],
        "alpha": alpha,
        "one_minus_alpha": 1 - alpha,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
    }


def rmsprop(  # type: ignore[no-untyped-def]
    p, g, v, b, a, lr, alpha, one_minus_alpha, eps, weight_decay, momentum,
    *, maximize, decays, centered, lerps_from_gradient, has_momentum,
):  # fmt: skip
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    v = v * alpha + one_minus_alpha * g * g
    if centered:
        if lerps_from_gradient:  # noqa: SIM108
            a = g - (g - a) * alpha
        else:
            a = a + one_minus_alpha * (g - a)
        denominator = sqrt(v - a * a) + eps
    else:
        denominator = sqrt(v) + eps
    if has_momentum:
        b = b * momentum + g / denominator
        p = p - lr * b
    else:
        p = p - lr * g / denominator
    return p, v, b, a


RMSPROP = Elementwise(
    name="RMSprop",
    defaults=_DEFAULTS,
    slot_keys=("square_avg", "momentum_buffer", "grad_avg"),
    check=check,
    options=options,
    scalars=scalars,
    formula=rmsprop,
)
