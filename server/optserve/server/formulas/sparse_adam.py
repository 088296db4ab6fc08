"""Adam for gradients of some rows, as torch.optim.SparseAdam: rows without a gradient keep their moments and their values.

    m_t = m_{t-1} + (1 - β1) (g_t - m_{t-1})
    v_t = v_{t-1} + (1 - β2) (g_t² - v_{t-1})
    p_t = p_{t-1} - γ √(1 - β2^t) / (1 - β1^t) · m_t / (√v_t + ε)

t counts the parameter's steps, not a row's, and as an integer. Kingma and Ba, 2015 (adam.py), with the rearranged correction of
its section 2, so that ε weighs less in the first steps than Adam's does. Deviation from torch: complex parameters are refused
without their indices.
"""

from __future__ import annotations

import math

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group, Shape
from optserve.server.formulas.language import sqrt

_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False}


def check(group: Group) -> None:
    """torch's checks."""
    checks.above_zero(group, "lr", "Invalid learning rate: {}")
    checks.above_zero(group, "eps", "Invalid epsilon value: {}")
    checks.betas(group)
    checks.flag(group, "maximize")


def check_parameter(_name: str, _shape: Shape, is_complex: bool) -> None:
    """torch's check of the parameters."""
    if is_complex:
        raise ValueError("SparseAdam does not support complex parameters")


def sparse(_: Group) -> bool:
    """It is made for them."""
    return False


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"]}


def scalars(group: Group, step: int, _: Carried) -> dict[str, float]:
    """Bias corrections in float64."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return {
        "step_size": float(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step),
        "one_minus_beta1": 1 - beta1,
        "one_minus_beta2": 1 - beta2,
        "eps": group["eps"],
    }


def sparse_adam(p, g, m, v, step_size, one_minus_beta1, one_minus_beta2, eps, *, maximize):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    m = m + (g - m) * one_minus_beta1
    v = v + (g * g - v) * one_minus_beta2
    return p - step_size * (m / (sqrt(v) + eps)), m, v


SPARSE_ADAM = Elementwise(
    name="SparseAdam",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg", "exp_avg_sq"),
    integer_steps=True,
    check=check,
    check_parameter=check_parameter,
    sparse=sparse,
    no_dense="SparseAdam does not support dense gradients, please consider Adam instead",
    options=options,
    scalars=scalars,
    formula=sparse_adam,
)
