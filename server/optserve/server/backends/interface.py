"""What a backend does: it compiles formulas, allocates flat arrays, folds gradients and measures them.

Arrays are one-dimensional and contiguous; they need not be aligned, and inputs may be read-only. The state dtype is float64 for
float64 parameters and float32 for all others; the wire dtype is the parameter's own. Backends agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optserve.server.formulas import Optimizer

Array = npt.NDArray[Any]


class Kernel(Protocol):
    """One compiled formula. Releases the GIL, and may run in several threads on different slices."""

    def __call__(
        self,
        masters: Array,
        gradients: Array,
        slots: Sequence[Array],
        scalars: Mapping[str, float],
        scale: float,
        weights: Array | None,
    ) -> None:
        """Updates slices of equal length in place.

        The formula's gradient is `gradients * scale` in the state dtype; `gradients` has the state or the wire dtype and is not
        changed. `slots` come in the order of `Optimizer.slots`. `weights` receives the masters narrowed to a 16-bit wire
        dtype; it is None for float32 and float64, where the masters are the weights. ValueError if lengths differ.
        """


class Backend(Protocol):
    """One way to compute. Stateless apart from what it compiled; thread safe."""

    @property
    def name(self) -> str:
        """What `--backend` calls it."""

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        """A flat array that begins at a multiple of 64 bytes."""

    def prepare(self, dtype: np.dtype[Any]) -> None:
        """Compiles what `finite`, `fold` and `sum_of_squares` need for parameters of this wire dtype."""

    def kernel(self, optimizer: Optimizer, options: Mapping[str, bool], dtype: np.dtype[Any]) -> Kernel:
        """The kernel for parameters of a wire dtype: compiled on return (for gradients of the state dtype), and cached."""

    def finite(self, values: Array) -> bool:
        """Whether no value is NaN or infinite. Any of the four wire dtypes; exact, without large temporaries."""

    def fold(self, into: Array, values: Array, ratio: float, first: bool) -> None:
        """`into = ratio * values` if first, else `into += ratio * values`, in the state dtype (that of `into`)."""

    def sum_of_squares(self, values: Array) -> float:
        """Of an array of the state dtype, accumulated in float64 in an order that depends on its length alone."""


def check_lengths(masters: Array, gradients: Array, slots: Sequence[Array], weights: Array | None) -> None:
    """ValueError if they differ: a compiled loop would read past the end."""
    length = len(masters)
    fits = len(gradients) == length and (weights is None or len(weights) == length)
    if not fits or any(len(slot) != length for slot in slots):
        raise ValueError(f"a kernel of {length} masters was given slices of other lengths")


def aligned_zeros(length: int, dtype: npt.DTypeLike) -> Array:
    """Zeros on a cache line's boundary. MemoryError if there is no room."""
    kind = np.dtype(dtype)
    raw = np.zeros(length * kind.itemsize + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + length * kind.itemsize].view(kind)
