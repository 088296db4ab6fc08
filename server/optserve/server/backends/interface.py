"""What a backend does: it compiles formulas, allocates flat arrays, folds gradients and measures them.

Arrays are one-dimensional and contiguous; they need not be aligned, and inputs may be read-only. The state dtype is float64 for
float64 parameters and float32 for all others; the wire dtype is the parameter's own. Backends agree bit for bit.

There are two kinds of memory. Transports read and write host memory, the weights. Kernels work on state memory: masters, slots
and accumulators. On a CPU they are one; elsewhere an array of state memory is a device's, of which the other rooms know no more
than its length, shape and dtype, and how to slice and reshape it. All else is done by the methods of `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from optserve.server.formulas import Elementwise

Array = npt.NDArray[Any]

Result = TypeVar("Result")


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

        The formula's gradient is `gradients * scale` in the state dtype; `gradients` has the state or the wire dtype, is not
        changed, and may be host memory. `slots` come in the order of `Elementwise.slots`. `weights` receives the masters
        narrowed to a 16-bit wire dtype; it is None for float32 and float64, where the masters are the weights. ValueError if
        lengths differ.
        """


class Backend(Protocol):
    """One way to compute. Stateless apart from what it compiled; thread safe."""

    @property
    def name(self) -> str:
        """What `--backend` calls it."""

    @property
    def description(self) -> str:
        """What people are told that updates run on."""

    @property
    def on_host(self) -> bool:
        """Whether state memory is host memory."""

    @property
    def threads(self) -> int | None:
        """How many threads an update is worth; None: one a core."""

    @property
    def xp(self) -> Any:
        """The module of array functions for state memory: numpy or cupy."""

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        """State memory that begins at a multiple of 64 bytes. MemoryError."""

    def host_zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        """Host memory that begins at a multiple of 64 bytes. MemoryError."""

    def to_host(self, array: Array) -> Array:
        """State memory for reading: itself if it is the host's, else a copy."""

    def place(self, values: Array) -> Array:
        """Host memory as state memory: itself if it is, else a copy. Whatever is state memory already stays as it is."""

    def write(self, into: Array, values: Array | float) -> None:
        """State memory from host memory of the same shape or from one number, cast to its dtype. `values` is done with."""

    def clear(self, array: Array, indices: npt.NDArray[np.intp]) -> None:
        """Zeroes elements of state memory. A caller that clears the same ones again passes the same `indices` object."""

    def publish(self, source: Array, weights: Array) -> None:
        """Brings host memory up to date with what was computed: with masters, which are narrowed if the weights have 16 bits,
        or with the twin of 16-bit weights in state memory. Nothing is done where both are the same memory."""

    def take_rows(self, source: Array, ids: Array, into: Array) -> None:
        """`into[i] = source[ids[i]]`. All are state memory: matrices of equal rows, and int64 numbers of rows that exist."""

    def put_rows(self, values: Array, ids: Array, into: Array) -> None:
        """`into[ids[i]] = values[i]`, likewise; no number comes twice."""

    def publish_rows(self, source: Array, ids: npt.NDArray[np.int64], weights: Array) -> None:
        """`weights[ids[i]] = source[i]`, where the weights are host memory of the same dtype, and so are the ids."""

    def run(self, work: Callable[[], Result], compiles: bool = False) -> Result:
        """Does work that uses `xp`, where and in the order in which this backend's own calls are done.

        `compiles`: it may be the first to use some of its functions, which can take minutes.
        """

    def prepare(self, dtype: np.dtype[Any]) -> None:
        """Compiles what `finite`, `fold` and `sum_of_squares` need for parameters of this wire dtype."""

    def kernel(self, optimizer: Elementwise, options: Mapping[str, bool], dtype: np.dtype[Any]) -> Kernel:
        """The kernel for parameters of a wire dtype: compiled on return (for gradients of the state dtype), and cached."""

    def finite(self, values: Array) -> bool:
        """Whether no value is NaN or infinite. Any of the four wire dtypes; exact, without large temporaries."""

    def fold(self, into: Array, values: Array, ratio: float, first: bool) -> None:
        """`into = ratio * values` if first, else `into += ratio * values`, in the state dtype (that of `into`).

        `values` are host memory, `into` is state memory.
        """

    @property
    def squares_at_end(self) -> bool:
        """Whether a norm is rather computed of whole arrays at a round's end than block by block, each while in the cache."""

    def sums_of_squares(self, values: Array, length: int) -> list[float]:
        """`sum_of_squares` of each `length` elements in turn; the last may be fewer."""

    def sum_of_squares(self, values: Array) -> float:
        """Of an array of the state dtype, accumulated in float64 in an order that depends on its length alone."""


def check_lengths(masters: Array, gradients: Array, slots: Sequence[Array], weights: Array | None) -> None:
    """ValueError if they differ: a compiled loop would read past the end."""
    length = len(masters)
    fits = len(gradients) == length and (weights is None or len(weights) == length)
    if not fits or any(len(slot) != length for slot in slots):
        raise ValueError(f"a kernel of {length} masters was given slices of other lengths")
