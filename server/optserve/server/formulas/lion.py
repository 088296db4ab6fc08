"""Lion, the evolved sign momentum.

    c_t = β1 m_{t-1} + (1 - β1) g_t
    p_t = p_{t-1} - γ (sign(c_t) + λ p_{t-1})
    m_t = β2 m_{t-1} + (1 - β2) g_t

Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675, Algorithm 2, whose betas are the defaults;
γ is that of its authors' code. Where c is 0, only the decay moves p. torch has no Lion.
"""

from __future__ import annotations

from optserve.server.formulas import checks
from optserve.server.formulas.definition import Carried, Elementwise, Group
from optserve.server.formulas.language import sign

_DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}


def check(group: Group) -> None:
    """The checks of torch's Adam, for the hyperparameters that both have."""
    checks.learning_rate(group)
    checks.betas(group)
    checks.weight_decay(group)
    checks.flag(group, "maximize")


def options(group: Group) -> dict[str, bool]:
    """What decides the shape of the loop."""
    return {"maximize": group["maximize"], "decays": group["weight_decay"] != 0}


def scalars(group: Group, _step: int, _: Carried) -> dict[str, float]:
    """The same at every step."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return {
        "lr": lr,
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "shrinkage": 1 - lr * float(group["weight_decay"]),
    }


def lion(p, g, m, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, shrinkage, *, maximize, decays):  # type: ignore[no-untyped-def]
    """One element of one step."""
    if maximize:
        g = -g
    if decays:
        p = p * shrinkage
    p = p - lr * sign(beta1 * m + one_minus_beta1 * g)
    return p, beta2 * m + one_minus_beta2 * g


LION = Elementwise(
    name="Lion",
    defaults=_DEFAULTS,
    slot_keys=("exp_avg",),
    counts_steps=False,
    check=check,
    options=options,
    scalars=scalars,
    formula=lion,
)
