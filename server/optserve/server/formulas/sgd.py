"""SGD with momentum, as torch.optim.SGD.

    b_t = μ b_{t-1} + (1 - τ) g_t, with b_1 = g_1
    p_t = p_{t-1} - γ b_t, or p_{t-1} - γ (g_t + μ b_t) with Nesterov

Momentum: Polyak, 1964; Nesterov form: Sutskever et al., "On the importance of initialization and momentum", 2013, as torch
modifies it. Deviation from torch: NaN hyperparameters are refused, torch lets them pass.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group

_DEFAULTS = {
    "lr": 1e-3,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.at_least_zero(group, "momentum", "Invalid momentum value: {}")
    checks.not_nan(group, "dampening")
    checks.weight_decay(group)
    if checks.flag(group, "nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    checks.flag(group, "maximize")
    checks.execution(group)


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {
        "maximize": group["maximize"],
        "decays": group["weight_decay"] != 0,
        "has_momentum": group["momentum"] != 0,
        "dampens": group["dampening"] != 0,
        "nesterov": group["nesterov"],
    }


def sparse(group: Group) -> bool:
    """torch's refusal. A row that was touched once moves on with its momentum."""
    if group["weight_decay"] != 0:
        decay = group["weight_decay"]
        raise RuntimeError(
            f"add(sparse, dense) is not supported. Use add(dense, sparse) instead. (weight_decay is {decay}; it must be 0)"
        )
    return bool(group["momentum"] != 0)


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """The first step takes the gradient as it is, dampened by nothing: torch's rule."""
    first = step == 1
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "momentum": group["momentum"],
        "kept": 0.0 if first else group["momentum"],
        "taken": 1.0 if first else 1 - group["dampening"],
    }


def sgd(p, g, b, lr, weight_decay, momentum, kept, taken, *, maximize, decays, has_momentum, dampens, nesterov):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        g = g + weight_decay * p
    if has_momentum:
        b = kept * b
        if dampens:  # noqa: SIM108
            b = b + taken * g
        else:
            b = b + g
        if nesterov:  # noqa: SIM108
            g = g + momentum * b
        else:
            g = b
    return p - lr * g, b


SGD = Elementwise(
    name="SGD",
    defaults=_DEFAULTS,
    slot_keys=("momentum_buffer",),
    counts_steps=False,
    check=check,
    sparse=sparse,
    options=options,
    scalars=scalars,
    formula=sgd,
)
