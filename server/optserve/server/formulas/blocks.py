"""Whole tensors in blocks: what array functions on NumPy or CuPy have in common.

On the host a block stays in a core's cache from one call to the next; on a device it is large enough to hide the launches.
Norms are sums of float64 squares and stay 0-d arrays, so that no device is waited for; nothing here depends on how many threads
a linear algebra library uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

HOST_BLOCK, DEVICE_BLOCK = 1 << 15, 1 << 22
"""Elements. Measured on the host for float32 LAMB: 8 K are 0.8 × as fast, more than 32 K hardly faster."""


def block_size(xp: Any, size: int) -> int:
    """The elements of the largest block of an array of `size` elements."""
    return min(size, HOST_BLOCK if xp is np else DEVICE_BLOCK)


def blocks(xp: Any, size: int) -> Iterator[slice]:
    """The slices of a flat array of `size` elements; only the last may be shorter than `block_size`."""
    length = block_size(xp, size)
    for begin in range(0, size, max(length, 1)):
        yield slice(begin, min(begin + length, size))


Piece = tuple[slice, slice, slice]


def pieces(xp: Any, shape: tuple[int, int, int]) -> Iterator[Piece]:
    """The parts of a batch of matrices, none larger than `block_size`: whole matrices, else whole rows, where they fit."""
    batch, rows, columns = shape
    limit = block_size(xp, batch * rows * columns)
    wide = min(columns, limit)
    high = min(rows, max(limit // wide, 1)) if wide == columns else 1
    deep = max(limit // (high * wide), 1) if (high, wide) == (rows, columns) else 1
    for first in range(0, batch, deep):
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                yield slice(first, first + deep), slice(top, top + high), slice(left, left + wide)


class SquareSum:
    """A sum of squares over blocks, in float64."""

    def __init__(self, xp: Any, size: int) -> None:
        self._xp = xp
        self._wide = xp.empty(block_size(xp, size), np.float64)
        self._total = xp.zeros((), np.float64)

    def add(self, block: Any) -> None:
        """Adds the squares of a block of any shape."""
        squares = self._wide[: block.size].reshape(block.shape)
        self._xp.multiply(block, block, out=squares, dtype=np.float64)
        self._total += squares.sum()

    def root(self) -> Any:
        """The norm, 0-d in float64."""
        return self._xp.sqrt(self._total)


def norm(xp: Any, flat: Any) -> Any:
    """The Euclidean norm of a flat array, 0-d in float64."""
    total = SquareSum(xp, flat.size)
    for block in blocks(xp, flat.size):
        total.add(flat[block])
    return total.root()


def finite(xp: Any, factor: Any, dtype: Any) -> Any:
    """A positive factor, 0-d, in that dtype: its largest number in the place of infinity, which times 0 would be NaN."""
    return xp.minimum(factor, np.finfo(dtype).max).astype(dtype)


def scaled_add(xp: Any, shrinkage: float, p: Any, factor: Any, flat: Any) -> None:
    """p := shrinkage · p + factor · flat, for flat arrays and a factor (a scalar or 0-d) in the dtype of p."""
    buffer = xp.empty(block_size(xp, p.size), p.dtype)
    for block in blocks(xp, p.size):
        term = buffer[: p[block].size]
        xp.multiply(flat[block], factor, out=term)
        if shrinkage != 1:
            xp.multiply(p[block], shrinkage, out=p[block])
        xp.add(p[block], term, out=p[block])


def lerp(xp: Any, start: Any, end: Any, weight: float, out: Any) -> None:
    """out := start + weight · (end - start), as torch rounds it; `out` may be `start` or `end`."""
    taken = start.dtype.type(weight)
    step = end - start
    if abs(weight) < 0.5:
        step *= taken
        xp.add(start, step, out=out)
    else:
        step *= start.dtype.type(1) - taken
        xp.subtract(end, step, out=out)
