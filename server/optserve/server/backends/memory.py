"""State memory that is the host's: the flat arrays that transports read and write are those on which kernels work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from optserve.server.backends.interface import Array

Result = TypeVar("Result")


class HostMemory(ABC):
    """Implements the memory methods of Backend for a CPU, and what follows from them."""

    name: str
    on_host = True
    squares_at_end = False
    threads: int | None = None
    xp: ModuleType = np

    @property
    def description(self) -> str:
        return self.name

    def zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        return aligned_zeros(length, dtype)

    def host_zeros(self, length: int, dtype: npt.DTypeLike) -> Array:
        return self.zeros(length, dtype)

    def to_host(self, array: Array) -> Array:
        return array

    def place(self, values: Array) -> Array:
        return values

    def write(self, into: Array, values: Array | float) -> None:
        with np.errstate(all="ignore"):
            np.copyto(into, values, casting="unsafe")

    def clear(self, array: Array, indices: npt.NDArray[np.intp]) -> None:
        array[indices] = 0

    def publish(self, source: Array, weights: Array) -> None:
        if not np.may_share_memory(source, weights):
            self.write(weights, source)

    def take_rows(self, source: Array, ids: Array, into: Array) -> None:
        if into.size:
            np.take(source, ids, axis=0, out=into, mode="clip")  # "raise" would go through a buffer

    def put_rows(self, values: Array, ids: Array, into: Array) -> None:
        put_rows(values, ids, into)

    def publish_rows(self, source: Array, ids: npt.NDArray[np.int64], weights: Array) -> None:
        put_rows(source, ids, weights)

    def run(self, work: Callable[[], Result], compiles: bool = False) -> Result:  # noqa: ARG002 - nothing to wait for
        return work()

    @abstractmethod
    def sum_of_squares(self, values: Array) -> float: ...

    def sums_of_squares(self, values: Array, length: int) -> list[float]:
        return [self.sum_of_squares(values[begin : begin + length]) for begin in range(0, len(values), length)]


def put_rows(values: Array, ids: npt.NDArray[np.int64], into: Array) -> None:
    """`into[ids[i]] = values[i]`: contiguous matrices of one dtype. Whole rows as single elements take half the time."""
    if values.size:
        row = np.dtype((np.void, values.shape[1] * values.itemsize))
        into.view(row).reshape(-1)[ids] = values.view(row).reshape(-1)


def aligned_zeros(length: int, dtype: npt.DTypeLike) -> Array:
    """Zeros on a cache line's boundary. MemoryError if there is no room."""
    kind: np.dtype[Any] = np.dtype(dtype)
    raw = np.zeros(length * kind.itemsize + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + length * kind.itemsize].view(kind)
