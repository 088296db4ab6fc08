"""The arithmetic of host scalars: torch's float32 where it has that, and IEEE 754's results where Python would raise."""

from __future__ import annotations

import numpy as np

_LAST_STEP = 2**24  # torch counts in float32, where adding 1 to this changes nothing


def counted(step: int) -> float:
    """The step as torch counts it."""
    return float(min(step, _LAST_STEP))


def single(x: float) -> float:
    """x rounded to float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(x))


def quotient(x: float, y: float) -> float:
    """x / y; infinite or NaN where y is zero."""
    with np.errstate(all="ignore"):
        return float(np.float64(x) / np.float64(y))


def power(x: float, y: float) -> float:
    """x to the y; infinite where that is too large, NaN where it is not real."""
    with np.errstate(all="ignore"):
        return float(np.float64(x) ** np.float64(y))
