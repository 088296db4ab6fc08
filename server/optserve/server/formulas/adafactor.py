"""Adafactor, as torch.optim.Adafactor.

    β_t = 1 - t^τ,  ρ_t = min(γ, 1 / √t),  α_t = max(ε2, RMS(p_{t-1})) ρ_t
    R_t = β_t R_{t-1} + (1 - β_t) mean of g_t² over columns
    C_t = β_t C_{t-1} + (1 - β_t) mean of g_t² over rows
    V_t = R_t C_t / max(mean R_t, ε1), or for fewer than two dimensions V_t = β_t V_{t-1} + (1 - β_t) g_t²
    u_t = g_t / max(√V_t, ε1)
    p_t = (1 - γλ) p_{t-1} - α_t u_t / max(1, RMS(u_t) / d)

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, arXiv 1804.04235, as torch modifies
it: γ bounds ρ, ε1 is applied last, means in the place of sums. Of more than two dimensions the last two are rows and columns.
Where ε1 is None, it is the machine epsilon of the parameter's own dtype; in torch, of its group's first parameter. Deviation: a
parameter without elements is left alone; torch raises ZeroDivisionError there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from optserve.server.formulas import checks
from optserve.server.formulas.arithmetic import counted
from optserve.server.formulas.blocks import SquareSum, block_size, blocks, finite, lerp, norm, pieces, scaled_add
from optserve.server.formulas.definition import Group, Shape, Tensorwise

_DEFAULTS = {
    "lr": 1e-2,
    "beta2_decay": -0.8,
    "eps": (None, 1e-3),
    "d": 1.0,
    "weight_decay": 0.0,
    "foreach": None,
    "maximize": False,
}


def check(group: Group) -> None:
    """torch's checks."""
    checks.at_least_zero(group, "lr", "Learning rate should be >= 0 but is: {}")
    beta2_decay, d = checks.number(group, "beta2_decay"), checks.number(group, "d")
    if not beta2_decay <= 0.0:
        raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
    eps1, eps2 = checks.entries(group, "eps", 2)
    if eps1 is not None and not checks.real(eps1, "eps[0]") >= 0.0:
        raise ValueError(f"epsilon1 should be >= 0 but is: {eps1}")
    if not checks.real(eps2, "eps[1]") >= 0.0:
        raise ValueError(f"epsilon2 should be >= 0 but is: {eps2}")
    if not d >= 1.0:
        raise ValueError(f"Clipping threshold d should be >= 1 but is: {d}")
    checks.at_least_zero(group, "weight_decay", "weight_decay should be >= 0 but is: {}")
    checks.flag(group, "maximize")
    checks.execution(group)


def check_parameter(_name: str, _shape: Shape, is_complex: bool) -> None:
    """torch's check, which there comes at the first step."""
    if is_complex:
        raise RuntimeError("Adafactor does not support complex parameters")


def shapes(_: Group, shape: Shape) -> dict[str, Shape]:
    """Means over rows and over columns; every element's own moment where there are no rows."""
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def update(xp: Any, group: Group, step: int, dtype: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
    """One step of one parameter; leaves its unclipped direction u in g."""
    if p.size == 0:
        return
    lr, weight_decay, d = float(group["lr"]), float(group["weight_decay"]), float(group["d"])
    t = counted(step)
    weight = t ** group["beta2_decay"]
    eps1, eps2 = group["eps"]
    eps1 = float(ml_dtypes.finfo(dtype).eps if eps1 is None else eps1)  # type: ignore[no-untyped-call]
    flat = p.reshape(-1)
    alpha = xp.maximum(norm(xp, flat) / p.size**0.5, float(eps2)) * min(lr, 1 / t**0.5)
    divide = _divide_elements if p.ndim < 2 else _divide_matrices
    length = divide(xp, g, state, weight, eps1)
    clipped = finite(xp, alpha / xp.maximum(length / p.size**0.5 / d, 1.0), p.dtype)
    scaled_add(xp, 1 - lr * weight_decay, flat, clipped if group["maximize"] else -clipped, g.reshape(-1))


def _divide_elements(xp: Any, g: Any, state: Mapping[str, Any], weight: float, eps1: float) -> Any:
    """g := u, by every element's own moment. Returns ‖u‖."""
    g, variance = g.reshape(-1), state["variance"].reshape(-1)
    total = SquareSum(xp, g.size)
    buffer = xp.empty(block_size(xp, g.size), g.dtype)
    for block in blocks(xp, g.size):
        part, kept = g[block], variance[block]
        estimate = buffer[: part.size]
        xp.multiply(part, part, out=estimate)
        lerp(xp, kept, estimate, weight, out=kept)
        xp.maximum(kept, eps1 * eps1, out=estimate)
        xp.sqrt(estimate, out=estimate)
        xp.divide(part, estimate, out=part)
        total.add(part)
    return total.root()


def _divide_matrices(xp: Any, g: Any, state: Mapping[str, Any], weight: float, eps1: float) -> Any:
    """g := u, by the product of row and column means. Returns ‖u‖."""
    rows, columns = g.shape[-2:]
    g = g.reshape(-1, rows, columns)
    row_var, column_var = state["row_var"].reshape(-1, rows, 1), state["col_var"].reshape(-1, 1, columns)
    buffer = xp.empty(block_size(xp, g.size), g.dtype)
    row_sums, column_sums = _sums_of_squares(xp, g, buffer)
    lerp(xp, row_var, (row_sums / columns).astype(g.dtype), weight, out=row_var)
    lerp(xp, column_var, (column_sums / rows).astype(g.dtype), weight, out=column_var)
    means = xp.maximum(row_var.mean(axis=-2, keepdims=True, dtype=np.float64).astype(g.dtype), eps1)
    total = SquareSum(xp, g.size)
    for batch, high, wide in pieces(xp, g.shape):
        part = g[batch, high, wide]
        estimate = buffer[: part.size].reshape(part.shape)
        xp.multiply(row_var[batch, high], column_var[batch, :, wide], out=estimate)
        xp.divide(estimate, means[batch], out=estimate)
        xp.maximum(estimate, eps1 * eps1, out=estimate)
        xp.sqrt(estimate, out=estimate)
        xp.divide(part, estimate, out=part)
        total.add(part)
    return total.root()


def _sums_of_squares(xp: Any, g: Any, buffer: Any) -> tuple[Any, Any]:
    """Of every row and of every column of a batch of matrices, in float64, with the summed axis kept."""
    batches, rows, columns = g.shape
    of_rows = xp.zeros((batches, rows, 1), np.float64)
    of_columns = xp.zeros((batches, 1, columns), np.float64)
    for batch, high, wide in pieces(xp, g.shape):
        part = g[batch, high, wide]
        squares = buffer[: part.size].reshape(part.shape)
        xp.multiply(part, part, out=squares)
        of_rows[batch, high] += squares.sum(axis=-1, keepdims=True)
        of_columns[batch, :, wide] += squares.sum(axis=-2, keepdims=True)
    return of_rows, of_columns


ADAFACTOR = Tensorwise(
    name="Adafactor",
    defaults=_DEFAULTS,
    slot_keys=("row_var", "col_var", "variance"),
    check=check,
    check_parameter=check_parameter,
    shapes=shapes,
    update=update,
)
