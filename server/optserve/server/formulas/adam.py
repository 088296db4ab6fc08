"""Adam, as torch.optim.Adam.

    m_t = β1 m_{t-1} + (1 - β1) g_t
    v_t = β2 v_{t-1} + (1 - β2) g_t²
    p_t = p_{t-1} - γ / (1 - β1^t) · m_t / (√v_t / √(1 - β2^t) + ε)

Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; AMSGrad (√v̂ of the largest v so far): Reddi et al., "On the
Convergence of Adam and Beyond", 2018; decoupled weight decay: see adamw.py. The order of operations is that of torch's
single-tensor loop: m as a lerp, ε outside the root. Each check also refuses NaN, as torch's do.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import maximum, sqrt

_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)
    if not all(isinstance(beta, float) for beta in group["betas"]):
        raise ValueError("betas must be either both floats or both Tensors")
    for name in ("amsgrad", "maximize", "decoupled_weight_decay"):
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
        "amsgrad": group["amsgrad"],
    }


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """Bias corrections in float64, from a step in float32, as torch has them."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = group["betas"]
    t = counted(step)
    return {
        "step_size": lr / (1 - beta1**t),
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "root_correction": (1 - beta2**t) ** 0.5,
        "eps": group["eps"],
        "weight_decay": weight_decay,
        "shrinkage": 1 - lr * weight_decay,
    }


def adam(  # type: ignore[no-untyped-def]
    p, g, m, v, v_max,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps, weight_decay, shrinkage,
    *, maximize, decays_weights, decays_gradient, lerps_from_gradient, amsgrad,
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
    if amsgrad:
        v_max = maximum(v_max, v)
        denominator = sqrt(v_max) / root_correction + eps
    else:
        denominator = sqrt(v) / root_correction + eps
    return p - step_size * m / denominator, m, v, v_max


ADAM = Elementwise(
    name="Adam",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    check=check,
    no_sparse="Adam does not support sparse gradients, please consider SparseAdam instead",
    options=options,
    scalars=scalars,
    formula=adam,
)
