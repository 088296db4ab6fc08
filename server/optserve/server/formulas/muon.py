"""Muon, as torch.optim.Muon: momentum whose matrix is orthogonalised before it is applied. Matrices only.

    b_t = μ b_{t-1} + (1 - μ) g_t
    x = g_t + μ (b_t - g_t) with Nesterov, else b_t; transposed if it is higher than wide
    x := x / max(‖x‖, ε), then k times: G = x xᵀ, x := a x + (b G + c G²) x
    p_t = (1 - γλ) p_{t-1} - γ s x

s is √max(1, rows / columns), or 0.2 √max(rows, columns) to match AdamW's step (adjust_lr_fn). Jordan, "Muon: An optimizer for
hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon; Liu et al., "Muon is Scalable for LLM
Training", 2025, arXiv 2502.16982. As in torch the iteration runs in bfloat16 for every dtype: matrices are float32 arrays of
bfloat16 values, and each result is rounded once. Products are summed in float32 (TF32 would give the same ones) by the linear
algebra library, in an order that may change with its version and number of threads: the only bits here that do.

Deviations: what torch refuses at the first step (ns_steps, ns_coefficients, complex parameters) is refused at once; a NaN ε or
coefficient is refused; a parameter without elements is left alone; a bfloat16 momentum buffer, which torch without Nesterov
overwrites with the normalised matrix, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve.server.formulas import checks
from optserve.server.formulas.blocks import block_size, blocks, lerp, norm, scaled_add
from optserve.server.formulas.definition import Group, Shape, Tensorwise

_DEFAULTS = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
    "eps": 1e-7,
    "ns_steps": 5,
    "adjust_lr_fn": None,
}

_SHIFT, _ONE, _BELOW_HALF, _KEPT, _NAN = (np.uint32(bits) for bits in (16, 1, 0x7FFF, 0xFFFF0000, 0x7FC00000))
"""Of a float32's bits."""


def check(group: Group) -> None:
    """torch's checks, those of its first step too."""
    checks.at_least_zero(group, "lr", "Learning rate should be >= 0 but is: {}")
    checks.at_least_zero(group, "momentum", "momentum should be >= 0 but is: {}")
    checks.at_least_zero(group, "weight_decay", "weight decay should be >= 0 but is: {}")
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
    checks.flag(group, "nesterov")
    checks.not_nan(group, "eps")
    if checks.integer(group, "ns_steps") >= 100:
        raise ValueError("Number of steps must be less than 100 for computational efficiency")
    _check_coefficients(group["ns_coefficients"])


def _check_coefficients(value: object) -> None:
    if isinstance(value, tuple | list) and len(value) != 3:
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    for index, entry in enumerate(checks.entries({"ns_coefficients": value}, "ns_coefficients", 3)):
        if math.isnan(checks.real(entry, f"ns_coefficients[{index}]")):
            raise ValueError(f"Invalid coefficient at index {index}: {entry}")


def check_parameter(_: str, shape: Shape, is_complex: bool) -> None:
    """torch's checks; it raises the second at the first step."""
    if len(shape) != 2:
        size = f"torch.Size({list(shape)})"
        raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {size}")
    if is_complex:
        raise RuntimeError("Muon does not support complex parameters")


def shapes(_: Group, shape: Shape) -> dict[str, Shape]:
    """The momentum."""
    return {"momentum_buffer": shape}


def update(xp: Any, group: Group, _step: int, _: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
    """One step of one parameter."""
    if p.size == 0:
        return
    lr, weight_decay, momentum = float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])
    momentum_buffer = state["momentum_buffer"]
    lerp(xp, momentum_buffer, g, 1 - momentum, out=momentum_buffer)
    direction = momentum_buffer
    if group["nesterov"]:
        lerp(xp, g, momentum_buffer, momentum, out=g)
        direction = g
    orthogonal = orthogonalised(xp, direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
    rate = -lr * _adjustment(group["adjust_lr_fn"], p.shape)
    scaled_add(xp, 1 - lr * weight_decay, p.reshape(-1), p.dtype.type(rate), orthogonal.reshape(-1))


def _adjustment(adjust_lr_fn: str | None, shape: Shape) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalised(xp: Any, matrix: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """About U Vᵀ of the matrix U S Vᵀ, in bfloat16 values: a new float32 array. `matrix` has elements and is not changed."""
    is_high = matrix.shape[0] > matrix.shape[1]
    x = xp.array(matrix.T if is_high else matrix, np.float32, order="C")
    round_to_bfloat16(xp, x)
    length, least = norm(xp, x.reshape(-1)).astype(np.float32).reshape(1), np.array([float(eps)], np.float32)
    round_to_bfloat16(xp, length)
    round_to_bfloat16(np, least)
    xp.divide(x, xp.maximum(length, least[0]), out=x)
    round_to_bfloat16(xp, x)
    if steps > 0:
        x = _iterated(xp, x, coefficients, steps)
    return xp.ascontiguousarray(x.T) if is_high else x


def _iterated(xp: Any, x: Any, coefficients: tuple[float, float, float], steps: int) -> Any:
    """x after the Newton-Schulz steps; its memory is used."""
    a, b, c = (float(coefficient) for coefficient in coefficients)
    gram, polynomial = xp.empty((len(x), len(x)), np.float32), xp.empty((len(x), len(x)), np.float32)
    product = xp.empty_like(x)
    for _ in range(steps):
        xp.matmul(x, x.T, out=gram)
        round_to_bfloat16(xp, gram)
        xp.matmul(gram, gram, out=polynomial)
        xp.multiply(polynomial, c, out=polynomial)
        xp.multiply(gram, b, out=gram)
        xp.add(polynomial, gram, out=polynomial)
        round_to_bfloat16(xp, polynomial)
        xp.matmul(polynomial, x, out=product)
        xp.multiply(x, a, out=x)
        xp.add(product, x, out=product)
        round_to_bfloat16(xp, product)
        x, product = product, x
    return x


def round_to_bfloat16(xp: Any, values: Any) -> None:
    """Rounds a contiguous float32 array in place to the nearest bfloat16 values, ties to even; NaN stays NaN."""
    bits = values.reshape(-1).view(np.uint32)
    buffer = xp.empty(block_size(xp, bits.size), np.uint32)
    for block in blocks(xp, bits.size):
        part = bits[block]
        carry = buffer[: part.size]
        is_nan = xp.isnan(part.view(np.float32))
        xp.right_shift(part, _SHIFT, out=carry)
        xp.bitwise_and(carry, _ONE, out=carry)
        xp.add(carry, _BELOW_HALF, out=carry)
        xp.add(part, carry, out=part)
        xp.bitwise_and(part, _KEPT, out=part)
        xp.copyto(part, _NAN, where=is_nan)


MUON = Tensorwise(
    name="Muon",
    defaults=_DEFAULTS,
    slot_keys=("momentum_buffer",),
    counts_steps=False,
    check=check,
    check_parameter=check_parameter,
    shapes=shapes,
    update=update,
)
