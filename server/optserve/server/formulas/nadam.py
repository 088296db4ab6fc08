"""NAdam, as torch.optim.NAdam: Adam with Nesterov's momentum.

    μ_t = β1 (1 - ½ · 0.96^(t ψ)), with ψ = momentum_decay, and M_t = μ_1 ⋯ μ_t
    m_t = β1 m_{t-1} + (1 - β1) g_t
    v_t = β2 v_{t-1} + (1 - β2) g_t²
    p_t = p_{t-1} - γ ((1 - μ_t) / (1 - M_t) · g_t + μ_{t+1} / (1 - M_t μ_{t+1}) · m_t) / (√(v_t / (1 - β2^t)) + ε)

Dozat, "Incorporating Nesterov Momentum into Adam", 2016; decoupled weight decay: see adamw.py. torch keeps M in float32, and
so do we. Deviation from torch: where M rounds to 1, its division by zero raises; ours makes the parameter infinite or NaN.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted, quotient, single
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sqrt

_DEFAULTS = {
    "lr": 2e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "momentum_decay": 4e-3,
    "decoupled_weight_decay": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.learning_rate(group)
    checks.epsilon(group)
    checks.betas(group)
    checks.weight_decay(group)
    checks.at_least_zero(group, "momentum_decay", "Invalid momentum_decay value: {}")
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


def initial(_: Group) -> dict[str, float]:
    """The empty product."""
    return {"mu_product": 1.0}


def momentum(group: Group, t: float) -> float:
    """μ_t."""
    beta1, psi = float(group["betas"][0]), float(group["momentum_decay"])
    return beta1 * (1.0 - 0.5 * float(0.96 ** (t * psi)))


def carry(group: Group, step: int, carried: Carried) -> dict[str, float]:
    """M_t, of float32 factors."""
    return {"mu_product": single(carried["mu_product"] * single(momentum(group, counted(step))))}


def scalars(group: Group, step: int, carried: Carried) -> dict[str, float]:
    """Bias corrections in float64, from a step and M_t in float32."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = group["betas"]
    t = counted(step)
    mu, mu_next = momentum(group, t), momentum(group, t + 1)
    product = carry(group, step, carried)["mu_product"]
    return {
        "gradient_size": quotient(lr * (1.0 - mu), 1.0 - product),
        "momentum_size": quotient(lr * mu_next, 1.0 - product * mu_next),
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "correction": 1 - beta2**t,
        "eps": group["eps"],
        "weight_decay": weight_decay,
        "shrinkage": 1 - lr * weight_decay,
    }


def nadam(  # type: ignore[no-untyped-def]
    p, g, m, v,
    gradient_size, momentum_size, beta1, one_minus_beta1, beta2, one_minus_beta2, correction, eps, weight_decay, shrinkage,
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
    denominator = sqrt(v / correction) + eps
    p = p - gradient_size * g / denominator
    return p - momentum_size * m / denominator, m, v


NADAM = Elementwise(
    name="NAdam",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_avg_sq"),
    scalar_keys=("mu_product",),
    initial=initial,
    check=check,
    options=options,
    scalars=scalars,
    carry=carry,
    formula=nadam,
)
