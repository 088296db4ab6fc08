"""Optimizers as textbooks write them: one loop over float64 elements each, with nothing shared with optserve or torch.

Each family of optimizers has a file: loops, the names that they implement, and the variants in which the tests run them. A new
optimizer is added there and nowhere else.
"""

from __future__ import annotations

from reference import descent, layers, moments, squares
from reference.variant import Loop, Variant

__all__ = ["LOOPS", "VARIANTS", "Variant"]

LOOPS: dict[str, Loop] = {**descent.LOOPS, **layers.LOOPS, **moments.LOOPS, **squares.LOOPS}

VARIANTS: list[Variant] = [*descent.VARIANTS, *layers.VARIANTS, *moments.VARIANTS, *squares.VARIANTS]
"""Together they take every branch of every formula. Tests choose among them by their fields; their order means nothing."""
