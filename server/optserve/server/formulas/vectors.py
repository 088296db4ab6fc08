"""Arithmetic of long vectors on NumPy or CuPy whose results are numbers that decide what is done next.

Sums are of float64 products, block by block: nothing depends on how many threads a linear algebra library uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optserve.server.formulas.blocks import block_size, blocks, scaled_add


def dot(xp: Any, a: Any, b: Any) -> Any:
    """a · b, a scalar of the vectors' dtype."""
    wide, total = xp.empty(block_size(xp, a.size), np.float64), 0.0
    for block in blocks(xp, a.size):
        products = wide[: a[block].size]
        xp.multiply(a[block], b[block], out=products, dtype=np.float64)
        total += products.sum().item()
    return a.dtype.type(total)


def total_size(xp: Any, a: Any) -> Any:
    """Σ|aᵢ|, a scalar of the vector's dtype."""
    wide, total = xp.empty(block_size(xp, a.size), np.float64), 0.0
    for block in blocks(xp, a.size):
        sizes = wide[: a[block].size]
        xp.absolute(a[block], out=sizes)
        total += sizes.sum().item()
    return a.dtype.type(total)


def largest(xp: Any, a: Any) -> Any:
    """max |aᵢ|, a scalar of the vector's dtype: NaN if any is, 0 if there are none."""
    buffer, found = xp.empty(block_size(xp, a.size), a.dtype), a.dtype.type(0)
    for block in blocks(xp, a.size):
        sizes = buffer[: a[block].size]
        xp.absolute(a[block], out=sizes)
        found = np.maximum(found, a.dtype.type(sizes.max().item()))
    return found


def add(xp: Any, p: Any, factor: Any, v: Any) -> None:
    """p := p + factor · v."""
    scaled_add(xp, 1, p, p.dtype.type(factor), v)


def along(xp: Any, p: Any, factor: Any, v: Any) -> Any:
    """p + factor · v, a new vector of the bits that `add` gives."""
    point = xp.multiply(v, p.dtype.type(factor))
    return xp.add(p, point, out=point)
