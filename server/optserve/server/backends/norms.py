"""The order in which squares are summed: the same for every backend and any number of threads.

An array is cut into segments of SEGMENT elements. Within one, element i adds to lane i mod LANES, in order; the lanes are then
halved onto each other until one is left. The segments' sums are added in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from optserve.server.backends.threads import each

LANES = 1024
SEGMENT = 1 << 20

Array = npt.NDArray[Any]


def segmented_sum(values: Array, add_squares: Callable[[Array, Array], None]) -> float:
    """The sum of all segments. `add_squares(lanes, segment)` adds to LANES float64 lanes, releasing the GIL."""
    sums: dict[int, float] = {}

    def segment_sum(begin: int) -> None:
        lanes = np.zeros(LANES)
        add_squares(lanes, values[begin : begin + SEGMENT])
        sums[begin] = _halved(lanes, min(LANES, len(values) - begin))

    begins = range(0, len(values), SEGMENT)
    each(segment_sum, begins)
    total = 0.0
    for begin in begins:
        total += sums[begin]
    return total


def _halved(lanes: Array, used: int) -> float:
    width = 1 << (used - 1).bit_length()
    with np.errstate(over="ignore"):
        while width > 1:
            width //= 2
            lanes = lanes[:width] + lanes[width : 2 * width]
    return float(lanes[0])
